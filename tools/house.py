"""docs/house.svg: the rooms of the package on their floors, and the walk of a step. Run it after changing `FLOORS`; a test checks it.

`tests/test_floors.py` checks every import against `FLOORS`: a room imports only from floors below its own.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from html import escape
from pathlib import Path

PICTURE = Path(__file__).resolve().parent.parent / "docs/house.svg"
FLOORS: list[dict[str, str]] = [  # from the top; each room with its purpose
    {"cli": "options; no logic"},
    {"commands": "each command, from input to result", "doctor": "what this machine has"},
    {
        "train": "the step, the run",
        "evaluate": "benchmarks",
        "analyze": "entropy patterns",
        "ablate": "recipes x seeds",
        "plan": "memory, time",
        "ranks": "start or join",
    },
    {"convert": "folders and checkpoints", "report": "figures, HTML pages"},
    {"weights": "mapping, refit, checkpoints", "rollout": "vLLM in the rank, or servers"},
    {"model": "GPTModel with our head", "rl": "forks, loss, packing"},
    {"parallel": "mesh, vocabulary-parallel head, threshold", "data": "prompts, tokenizer, verdicts"},
    {"recipe": "one file specifies a run", "shape": "a model's sizes and layouts", "compat": "fixes to third-party code"},
]
GROUND = (
    *("recipe_file", "recipe_yaml", "run_folder", "options", "user_code", "did_you_mean", "repeated"),
    *("files", "lock", "process", "secret", "joined", "gpus", "room"),
)
"""Small modules on the lowest floor; on that floor rooms may import each other."""
WALK = ("prompts", "roll-out", "reward", "score", "forks", "update", "refit")
"""The phases of a training step."""

_INK, _SOFT, _LINE, _FORK, _FLOW = "#1d1b16", "#5f5b50", "#d8d4c8", "#c9521c", "#0b6aa8"
_LEFT, _WIDTH, _GAP, _HEIGHT, _STEP = 56, 808, 12, 64, 82


def floor_of() -> dict[str, int]:
    """The floor of every room; the lowest is 1."""
    rooms = {room: len(FLOORS) - depth for depth, floor in enumerate(FLOORS) for room in floor}
    return rooms | dict.fromkeys(("__init__", *GROUND), 1)


def render(package: Path) -> str:
    """The picture as SVG; `package` is the folder that shows which rooms are folders."""
    height = 20 + _STEP * len(FLOORS) + 133
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 {height}" font-family="ui-sans-serif,system-ui,sans-serif" role="img" '
        f'aria-label="The rooms of megafork on {len(FLOORS)} floors; a room imports only from floors below it">',
        '<rect width="100%" height="100%" rx="10" fill="#fcfbf7"/>',
    ]
    for depth, floor in enumerate(FLOORS):
        lines += _floor(package, len(FLOORS) - depth, floor, 20 + _STEP * depth)
    top = 20 + _STEP * len(FLOORS)
    ground = textwrap.wrap("and " + ", ".join(f"{room}.py" for room in GROUND), 110)
    lines += [_text(_LEFT, top + 4 + 17 * row, words, size=12, colour=_SOFT, mono=True) for row, words in enumerate(ground)]
    lines += _walk(top + 13 + 17 * len(ground))
    return "\n".join([*lines, "</svg>", ""])


def _floor(package: Path, number: int, rooms: dict[str, str], top: int) -> Iterator[str]:
    yield _text(24, top + 38, str(number), size=20, colour=_FORK, bold=True)
    width = (_WIDTH - _GAP * (len(rooms) - 1)) / len(rooms)
    for place, (room, caption) in enumerate(rooms.items()):
        left = _LEFT + place * (width + _GAP)
        name = f"{room}/" if (package / room).is_dir() else f"{room}.py"
        yield f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{_HEIGHT}" rx="6" fill="#fff" stroke="{_LINE}"/>'
        yield _text(left + 12, top + 27, name, size=16, colour=_INK, bold=True, mono=True)
        yield _text(left + 12, top + 48, caption, size=13, colour=_SOFT)
    if number > 1:
        yield f'<path d="M886 {top + 10} v78 m-4 -7 l4 7 l4 -7" fill="none" stroke="{_FORK}" stroke-width="1.6"/>'


def _walk(top: int) -> Iterator[str]:
    yield _text(24, top + 10, "A step", size=13, colour=_SOFT, bold=True)
    for place, phase in enumerate(WALK):
        left, colour = 24 + 127 * place, _FORK if phase == "forks" else _FLOW
        yield f'<rect x="{left}" y="{top + 22}" width="104" height="36" rx="18" fill="none" stroke="{colour}" stroke-width="1.6"/>'
        yield f'<text x="{left + 52}" y="{top + 45}" font-size="14" text-anchor="middle" fill="{colour}">{phase}</text>'
        if place < len(WALK) - 1:
            yield f'<path d="M{left + 106} {top + 40} h18 m-6 -4 l6 4 l-6 4" fill="none" stroke="{_SOFT}" stroke-width="1.4"/>'


def _text(x: float, y: float, text: str, *, size: int, colour: str, bold: bool = False, mono: bool = False) -> str:
    weight = ' font-weight="700"' if bold else ""
    family = ' font-family="ui-monospace,monospace"' if mono else ""
    return f'<text x="{x:.1f}" y="{y}" font-size="{size}"{weight} fill="{colour}"{family}>{escape(text)}</text>'


if __name__ == "__main__":
    PICTURE.write_text(render(PICTURE.parent.parent / "megafork"))
