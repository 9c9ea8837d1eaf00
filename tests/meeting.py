"""megafork's command line with one more command: two ranks that only meet. They start, fail and stop like those of any other job."""

from __future__ import annotations

import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import typer

from megafork import cli, ranks


def meet(folder: Path) -> None:
    raise typer.Exit(ranks.do(partial(_meet, folder), 2, folder))


def _meet(folder: Path) -> int:
    import torch.distributed as dist

    from megafork.parallel import meeting

    meeting.join("gloo", timedelta(minutes=5))
    step = 0
    while True:
        dist.barrier()
        time.sleep(0.01)
        step += 1
        if dist.get_rank() == 0:
            with (folder / "metrics.jsonl").open("a") as file:
                file.write(f'{{"step": {step}, "met": 2}}\n')


def main() -> None:
    cli.app.command()(meet)
    cli.main()


if __name__ == "__main__":
    import meeting  # under its own name, by which its ranks find what they run

    meeting.main()
