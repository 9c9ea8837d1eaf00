"""Live dashboards of a run's metrics: TensorBoard and, on request, Weights & Biases. Rank 0 only."""

from __future__ import annotations

import importlib.util
import os
import re
import uuid
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megafork.files import whole
from megafork.recipe import Log, Recipe, RecipeError
from megafork.train.writer import Writer

Row = Mapping[str, int | float | None]
"""A line of metrics.jsonl: "step", and metric name -> number or None."""


class Board(Protocol):
    """Plots the metrics passed to `write`, step by step, until `close`. None values are skipped."""

    def write(self, row: Row) -> None: ...

    def close(self) -> None: ...


def check_boards(log: Log) -> None:
    """Raise RecipeError if Weights & Biases is requested but unavailable. At a terminal, wandb prompts for a missing key."""
    if log.wandb is None:
        return
    if not re.fullmatch(r"[^/\\#?%:]{1,128}", log.wandb):
        raise RecipeError(f"log.wandb is {log.wandb!r}: it names a project, use up to 128 characters, and none of / \\ # ? % :")
    if log.wandb.lower() in ("true", "false", "yes", "no", "on", "off"):
        raise RecipeError(f"log.wandb is {log.wandb!r}: it names a project; leave it out, or give null, for none")
    if importlib.util.find_spec("wandb") is None:
        raise RecipeError(
            f"log.wandb is {log.wandb!r} but the package wandb is not installed: pip install 'megafork[wandb]', or leave log.wandb unset"
        )
    if os.environ.get("WANDB_MODE", "online") != "online":
        return
    import wandb

    try:
        wandb.login()
    except wandb.errors.Error as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"log.wandb is {log.wandb!r} but wandb can't log in ({reason}): run `wandb login`, or set WANDB_API_KEY, or WANDB_MODE=offline"
        ) from None
    finally:
        wandb.teardown()


def open_boards(recipe: Recipe, resume_step: int) -> list[Board]:
    """Open the dashboards that the recipe requests. `resume_step`: the last step in the checkpoint, 0 for a new run."""
    boards: list[Board] = [TensorBoard(recipe.run_folder / "tensorboard", resume_step)] if recipe.log.tensorboard else []
    return [*boards, *([WeightsAndBiases(recipe, resume_step)] if recipe.log.wandb is not None else [])]


class Unhurried:
    """A board that is written to in the background."""

    def __init__(self, board: Board, writer: Writer) -> None:
        self._board = board
        self._writer = writer

    def write(self, row: Row) -> None:
        self._writer.begin(f"step {row['step']} of the dashboards", partial(self._board.write, row))

    def close(self) -> None:
        self._writer.settle()
        self._board.close()


class TensorBoard:
    """Event files in `folder`; steps after `resume_step` that an earlier process wrote are hidden."""

    def __init__(self, folder: Path, resume_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # takes a second to import, and not every run writes it

        self._writer = SummaryWriter(str(folder), purge_step=resume_step + 1 if resume_step else 0)

    def write(self, row: Row) -> None:
        for key, value in row.items():
            if key != "step" and value is not None:
                self._writer.add_scalar(key, value, row["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run in the project `log.wandb`, with the recipe as its config; its files are in the run folder's wandb/.

    A resumed run continues the same W&B run, by the id in wandb/id. Logged steps cannot be undone: repeated steps keep their first numbers,
    which differ only in times. WANDB_MODE=offline keeps everything in wandb/ for `wandb sync`.
    """

    def __init__(self, recipe: Recipe, resume_step: int = 0) -> None:
        import wandb

        identity = recipe.run_folder / "wandb" / "id"
        if not (resume_step and identity.exists()):
            identity.parent.mkdir(parents=True, exist_ok=True)
            with whole(identity) as unfinished:
                unfinished.write_text(uuid.uuid4().hex[:12])
        self._run: Any = wandb.init(
            project=recipe.log.wandb,
            name=recipe.run.name,
            id=identity.read_text(),
            resume="allow",
            dir=recipe.run_folder,
            config=recipe.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, row: Row) -> None:
        step = row["step"]
        if step is not None and step >= self._run.step:
            self._run.log({key: value for key, value in row.items() if key != "step" and value is not None}, step=int(step))

    def close(self) -> None:
        import wandb

        self._run.finish()
        wandb.teardown()  # its own process may still be writing; ranks exit without running exit handlers
