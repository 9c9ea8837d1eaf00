"""Supervised training on prompt-response rows, with the same Megatron stack and head: the warm start of a run."""

from __future__ import annotations

import torch
from torch import Tensor

from megafork.data.prompts import Prompt, PromptOrder
from megafork.data.templates import last_token
from megafork.data.tokenizer import Tokenizer
from megafork.parallel.mesh import Mesh
from megafork.recipe import Recipe, RecipeError
from megafork.rl.batch import MicroBatch, Response
from megafork.rl.packing import packer, placement
from megafork.train.inputs import Inputs
from megafork.train.run import Metrics, Run, build_learner


def sft(recipe: Recipe, mesh: Mesh, inputs: Inputs) -> Metrics:
    """Run or resume supervised training: `rollout.prompts` rows per update, cross-entropy of the response and its end token.

    Every rank must call. Returns the last step's metrics.
    """
    rows = examples(inputs.train, inputs.tokenizer, recipe, positions=inputs.shape.max_positions)
    learner = build_learner(inputs, recipe, mesh, updates=recipe.train.steps)
    order = PromptOrder(inputs.train, recipe.run.seed)
    run = Run(recipe, mesh, inputs, learner)
    run.begin(show_every=max(1, recipe.train.steps // 20))
    if run.state is not None:
        order.restore(run.state["order"])
    last: Metrics = {}
    for step in run.steps:
        batch = [rows[prompt.index] for prompt in order.take(recipe.rollout.prompts)]
        tokens = sum(len(row.tokens) for row in batch)
        with run.step(step) as clock, clock("update"):
            update = learner.train(place(batch, recipe, mesh), cross_entropy)
        last = {
            "step": step,
            "loss/sft": update["loss"],
            "grad_norm": update["grad_norm"],
            "lr": update["lr"],
            "update/skipped": update["skipped"],
            **learner.expert_metrics(),
            **clock.metrics(tokens, mesh),
        }
        run.end_step(last, {"order": order.state()})
    run.close()
    return last


def examples(prompts: list[Prompt], tokenizer: Tokenizer, recipe: Recipe, *, positions: int) -> list[Response]:
    """Each row as a response that ends with one end-of-sequence token. Raises RecipeError if one is too long, also for a model that knows
    so many `positions`."""
    limit, end = recipe.rollout.max_response_length, last_token(recipe.data, tokenizer)
    rows = []
    for prompt in prompts:
        text, own_end = tokenizer.without_end(prompt.row["response"])
        tokens = [*tokenizer.encode(text, first=()), end if own_end is None else own_end]
        if len(tokens) > limit:
            raise RecipeError(
                f"data.train: {prompt.place} has a response of {len(tokens)} tokens with its end token, "
                f"rollout.max_response_length is {limit}: raise the limit or shorten the row"
            )
        if (length := len(prompt.tokens) + len(tokens)) > positions:
            raise RecipeError(
                f"data.train: {prompt.place} has {length} tokens, prompt and response together, but the model knows {positions} positions "
                "(max_position_embeddings, extended by YaRN if set): shorten the row"
            )
        rows.append(
            Response(
                group=prompt.index,
                sample=0,
                prompt=prompt.index,
                prompt_tokens=torch.tensor(prompt.tokens, dtype=torch.int32),
                tokens=torch.tensor(tokens, dtype=torch.int32),
                log_probs=torch.zeros(len(tokens)),
                truncated=False,
            )
        )
    return rows


def place(batch: list[Response], recipe: Recipe, mesh: Mesh) -> list[MicroBatch]:
    """This rank's micro-batches, with every response position selected and weighted by one over the tokens of the whole batch."""
    placed = placement([row.length for row in batch], recipe.micro_batch_tokens, mesh)[mesh.dp_rank]
    packed = packer(mesh, whole=recipe.micro_batch_padding, temperature=1.0)
    micros = [packed([batch[n] for n in members]) for members in placed]
    total = sum(len(row.tokens) for row in batch)
    for micro in micros:
        micro.mask = torch.ones_like(micro.positions, dtype=torch.bool)
        micro.weight = micro.mask / total
    return micros


def cross_entropy(log_prob: Tensor, micro: MicroBatch) -> tuple[Tensor, dict[str, Tensor]]:
    return -log_prob, {}
