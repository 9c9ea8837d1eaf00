"""Inputs of an analysis (models, tokenizer and prompts, checked against each other) and the paths of its files. No ranks needed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

from megafork.analyze.options import AnalysisOptions
from megafork.convert.named import AS_OPTIONS, NamedModel, find_model
from megafork.convert.sources import config_folder
from megafork.data.prompts import load_prompts
from megafork.data.templates import template_text
from megafork.data.tokenizer import Tokenizer
from megafork.recipe import Parallel, RecipeError, calling
from megafork.recipe_file import data_of_options
from megafork.rollout.config import EngineConfig
from megafork.rollout.engine import Sampling
from megafork.rollout.sample import LONGEST_PROMPT, SampleJob, response_limit
from megafork.rollout.store import prompt_key
from megafork.shape import check_layout, check_rollout_tp
from megafork.weights.checkpoint import complete


@dataclass(frozen=True)
class AnalysisInputs:
    """An analysis's inputs, checked against each other."""

    options: AnalysisOptions
    models: dict[str, NamedModel]
    """By label, oldest first; the last one generates the responses."""
    digests: dict[str, str]
    tokenizer: Tokenizer
    vocab: int
    job: SampleJob
    """The sampling of the responses."""
    layout: Parallel
    """Megatron's, for scoring."""
    remarks: list[str]
    """Lines about prompts that are not counted."""

    @property
    def folder(self) -> Path:
        return Path(self.options.out)

    @property
    def author(self) -> NamedModel:
        return next(reversed(self.models.values()))

    @property
    def responses(self) -> Path:
        return self.folder / "responses.parquet"

    def entropies(self, label: str) -> Path:
        return self.folder / "entropies" / f"{label}.parquet"

    @property
    def identity(self) -> str:
        """16 hex digits of everything that determines the responses; stored in their file."""
        store = self.job.store(self.job.samplings[0]).folder
        parts = [store.name, next(reversed(self.digests.values())), self.job.samples, list(self.job.prompts)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def identity_of(self, label: str) -> str:
        """Everything that determines a model's entropies; stored in their file."""
        return f"{self.identity} {self.digests[label]} {self.job.engine.dtype}"


@calling(AS_OPTIONS)
def read_inputs(options: AnalysisOptions) -> AnalysisInputs:
    """Read and check models, tokenizer and prompts; starts nothing. Raises RecipeError."""
    models = _models(options)
    label, author = next(reversed(models.items()))
    shape = author.check()
    tokenizer = author.tokenizer()
    for other in list(models)[:-1]:
        if models[other].check() != shape:
            raise RecipeError(
                f"--against {other} ({models[other].name!r}) has a different shape than {label}: compare checkpoints of one model"
            )
        _same_vocabulary(other, models[other].tokenizer(), tokenizer)
    remarks: list[str] = []
    data = data_of_options(options.prompts, LONGEST_PROMPT, template_text(options.template, tokenizer), options)
    prompts = load_prompts(options.prompts, data, tokenizer, needs=(), field="--prompts", remark=remarks.append)[: options.limit]
    longest = max(len(prompt.tokens) for prompt in prompts)
    max_tokens = response_limit(options.max_tokens, shape, longest)
    layout = Parallel(tp=options.tp, pp=options.pp, cp=options.cp, sp=options.tp > 1 and shape.moe is not None)
    check_layout(shape, layout)
    check_rollout_tp(shape, options.tp)
    engine = EngineConfig(
        model=str(author.folder),
        dtype=options.dtype or author.dtype,
        longest_sequence=longest + max_tokens,
        seed=options.seed,
        tp=options.tp,
        gpu_memory_fraction=0.9,
        kv_cache_mb=options.kv_cache_mb,
    )
    digests = {name: model.digest() for name, model in models.items()}
    sampling = Sampling(max_tokens, options.temperature, stop=tokenizer.eos_ids)
    by_key = {prompt_key(prompt.tokens): prompt.tokens for prompt in prompts}
    job = SampleJob(engine, by_key, options.samples, (sampling,), Path(options.out) / "completions" / digests[label])
    return AnalysisInputs(options, models, digests, tokenizer, shape.vocab, job, layout, remarks)


def _models(options: AnalysisOptions) -> dict[str, NamedModel]:
    author, place = find_model(options.model), Path(os.path.expanduser(options.model))
    found = [_labelled(word) for word in options.against] or _of_run(place)
    label = "final" if not options.against and found else place.resolve().name
    models: dict[str, NamedModel] = {}
    for name, model in [*found, (label, author)]:
        if name in models:
            raise RecipeError(f"--against: two models are named {name!r}: label one of them by LABEL=MODEL")
        if not re.fullmatch(r"[\w.-]+", name):
            raise RecipeError(
                f"--against: {name!r} is used as a file name: label the model by LABEL=MODEL, of letters, digits, `_`, `-`, `.`"
            )
        models[name] = model
    return models


def _labelled(word: str) -> tuple[str, NamedModel]:
    label, equals, model = word.partition("=")
    return (label, find_model(model)) if equals else (Path(word).resolve().name, find_model(word))


def _of_run(folder: Path) -> list[tuple[str, NamedModel]]:
    """The model that a run started from, and its checkpoints except the last, which is the run's model; empty if it is not a run."""
    checkpoints = [path for _, path in complete(folder / "checkpoints")]
    if not checkpoints:
        return []
    base = find_model(str(config_folder(checkpoints[0])))
    between = checkpoints[:-1]  # the last one is the run's model
    return [("base", base), *((path.name, find_model(str(path))) for path in between)]


def _same_vocabulary(label: str, other: Tokenizer, tokenizer: Tokenizer) -> None:
    mine, theirs = tokenizer.backend.get_vocab(), other.backend.get_vocab()
    if mine != theirs:
        odd = next(iter(sorted(mine.items() ^ theirs.items())))
        raise RecipeError(
            f"--against {label} has a different vocabulary ({len(theirs)} tokens, not {len(mine)}; {odd[0]!r} differs): "
            "compare checkpoints of one model"
        )
