"""Sampling outside training: many responses per prompt, saved to disk as they end; only missing ones are generated."""

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
"""In tokens. A longer prompt is refused."""
LONGEST_RESPONSE = 20480
"""In tokens, as in the paper."""


@dataclass(frozen=True)
class SampleJob:
    """What to sample, already checked: plain values that a launcher can pass to its ranks."""

    engine: EngineConfig
    prompts: Mapping[str, Sequence[int]]
    """Token ids, keyed by `store.prompt_key`."""
    samples: int
    """Responses per prompt."""
    samplings: tuple[Sampling, ...]
    folder: Path
    """Folder for the model's completions, with a subfolder per sampling."""

    def store(self, sampling: Sampling) -> Store:
        """The store of one sampling, named after everything that determines a completion except the model, prompt and sample number.

        The numbers of samples and of ranks are left out, since they change nothing but rounding.
        """
        said = self._identity(sampling)
        return Store(self.folder / hashlib.sha256(said.encode()).hexdigest()[:12])

    def _identity(self, sampling: Sampling) -> str:
        values: dict[str, Any] = {**asdict(sampling), "stop": sorted(sampling.stop)}
        return json.dumps({**values, "seed": self.engine.seed, "dtype": self.engine.dtype}, sort_keys=True)

    def missing(self) -> list[list[Key]]:
        """The keys of missing completions, per sampling. Raises RecipeError for a damaged file."""
        return [self._missing(sampling) for sampling in self.samplings]

    def _missing(self, sampling: Sampling) -> list[Key]:
        there = {(row["prompt"], row["sample"]) for row in self.store(sampling).rows()}
        return [key for prompt in self.prompts for sample in range(self.samples) if (key := (prompt, sample)) not in there]

    def describe(self) -> None:
        """Write a human-readable description of each sampling into its folder, whose name is only a hash."""
        for sampling in self.samplings:
            folder = self.store(sampling).folder
            folder.mkdir(parents=True, exist_ok=True)
            with whole(folder / "sampling.json") as unfinished:
                unfinished.write_text(self._identity(sampling) + "\n")


def response_limit(wanted: int | None, shape: Shape, longest_prompt: int) -> int:
    """Maximum tokens in a response: `--max-tokens` if given, else the lesser of `LONGEST_RESPONSE` and what the model's positions leave.

    Raises RecipeError if the longest prompt leaves no room, or less than `--max-tokens`.
    """
    left = shape.max_positions - longest_prompt
    if left < 1 or (wanted is not None and wanted > left):
        raise RecipeError(
            f"--max-tokens is {wanted} and the longest prompt has {longest_prompt} tokens, but the model knows {shape.max_positions} "
            "positions (max_position_embeddings, or what YaRN makes of them): lower it"
        )
    return wanted or min(LONGEST_RESPONSE, left)


def sample(job: SampleJob, weights: Weights, device: torch.device) -> None:
    """Generate the missing completions, divided among the engines. Every rank must call. `weights`: the model's, read once."""
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
            for _ in completions:  # every rank of the engine must take part
                pass
    engine.close()


def _shown(completions: Iterable[Any], total: int, title: str, *, quiet: bool) -> Iterable[Any]:
    console = Console(stderr=True)
    return track(completions, title, total, console=console, transient=True, disable=quiet or not console.is_terminal)
