"""Sampling outside of training: many responses to a list of prompts, kept on disk as they end, and only those that are not there yet."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import track

from megafork.data.tokenizer import load_tokenizer
from megafork.files import whole
from megafork.recipe import Parallel, RecipeError
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Request, Sampling, Weights, request_seed
from megafork.rollout.store import Key, Store
from megafork.shape import Shape

LONGEST_PROMPT = 4096
"""Tokens. A longer one is refused."""
LONGEST_RESPONSE = 20480
"""Tokens, the paper's."""


@dataclass(frozen=True)
class SampleJob:
    """What to sample, checked already: plain values that a launcher can hand to its ranks."""

    engine: EngineConfig
    prompts: Mapping[str, Sequence[int]]
    """Token ids by `store.prompt_key`."""
    samples: int
    """Responses to each prompt."""
    samplings: tuple[Sampling, ...]
    folder: Path
    """Of the model's completions; each sampling has a folder of its own in it."""

    def store(self, sampling: Sampling) -> Store:
        """Named by all that decides a completion besides the model, the prompt and the sample's number.

        How many samples there are and how many ranks draw them is not in it: these change nothing but rounding.
        """
        said = self._identity(sampling)
        return Store(self.folder / hashlib.sha256(said.encode()).hexdigest()[:12])

    def _identity(self, sampling: Sampling) -> str:
        values: dict[str, Any] = {**asdict(sampling), "stop": sorted(sampling.stop)}
        return json.dumps({**values, "seed": self.engine.seed, "dtype": self.engine.dtype}, sort_keys=True)

    def missing(self) -> list[list[Key]]:
        """For each sampling, what is not there yet. Raises RecipeError for a damaged file."""
        return [self._missing(sampling) for sampling in self.samplings]

    def _missing(self, sampling: Sampling) -> list[Key]:
        there = {(row["prompt"], row["sample"]) for row in self.store(sampling).rows()}
        return [key for prompt in self.prompts for sample in range(self.samples) if (key := (prompt, sample)) not in there]

    def describe(self) -> None:
        """Leave beside each sampling's completions what its folder's name stands for, for people."""
        for sampling in self.samplings:
            folder = self.store(sampling).folder
            folder.mkdir(parents=True, exist_ok=True)
            with whole(folder / "sampling.json") as unfinished:
                unfinished.write_text(self._identity(sampling) + "\n")


def response_limit(wanted: int | None, shape: Shape, longest_prompt: int) -> int:
    """Tokens that a response may have: as `--max-tokens` asks, else `LONGEST_RESPONSE` or what the model's positions leave.

    Raises RecipeError where the longest prompt leaves less.
    """
    left = shape.max_positions - longest_prompt
    if left < 1 or (wanted is not None and wanted > left):
        raise RecipeError(
            f"--max-tokens is {wanted} and the longest prompt has {longest_prompt} tokens, but the model knows {shape.max_positions} "
            "positions (max_position_embeddings, or what YaRN makes of them): lower it"
        )
    return wanted or min(LONGEST_RESPONSE, left)


def sample(job: SampleJob, weights: Weights, device: torch.device) -> None:
    """Generate what is missing; the engines share it. Every rank of the world calls. `weights`: of the model, read once."""
    from megafork.parallel.mesh import build_mesh
    from megafork.rollout.colocated import ColocatedEngine

    box: list[Any] = [job.missing() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(box, src=0)
    mesh = build_mesh(Parallel(), seed=job.engine.seed, device=device)
    engine = ColocatedEngine(job.engine, mesh, weights)
    engine.refit(0)
    tokenizer = load_tokenizer(job.engine.model)
    for number, (sampling, keys) in enumerate(zip(job.samplings, box[0], strict=True), start=1):
        mine = keys[engine.number :: engine.engines]
        requests = [Request(job.prompts[prompt], request_seed(job.engine.seed, int(prompt, 16), n)) for prompt, n in mine]
        completions = engine.stream(requests, sampling)
        if engine.rank == 0:
            title = f"sampling {number} of {len(job.samplings)}" if len(job.samplings) > 1 else "sampling"
            with job.store(sampling).append(engine.number) as write:
                for place, completion in _shown(completions, len(mine), title, quiet=mesh.rank != 0):
                    write(mine[place], completion, tokenizer.decode(completion.tokens))
        else:
            for _ in completions:  # the engine needs all its ranks
                pass
    engine.close()


def _shown(completions: Iterable[Any], total: int, title: str, *, quiet: bool) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(completions, title, total, console=console, transient=True, disable=quiet or not console.is_terminal)
