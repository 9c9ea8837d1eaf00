"""The house: a room imports only from floors below its own (docs/house.svg)."""

from __future__ import annotations

import ast
from pathlib import Path

import megafork

PACKAGE = Path(megafork.__file__).parent
FLOORS = {
    **dict.fromkeys(
        ("__init__", "recipe", "recipe_file", "recipe_yaml", "shape", "process", "files", "lock", "secret", "joined", "compat"), 1
    ),
    **dict.fromkeys(("parallel", "data"), 2),
    **dict.fromkeys(("model", "rl"), 3),
    **dict.fromkeys(("weights", "rollout", "analysis"), 4),
    **dict.fromkeys(("train", "plan", "evaluation", "study", "ablation", "ranks"), 5),
    **dict.fromkeys(("launch", "doctor"), 6),
    **dict.fromkeys(("cli",), 7),
}
GROUND_FLOOR = ("recipe", "recipe_file", "recipe_yaml", "shape", "process", "files", "lock", "secret", "joined", "compat")
"""They may use each other."""


def _room(module: str) -> str:
    return [*module.split("."), "__init__"][1]


def _imports(file: Path) -> set[str]:
    rooms: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "megafork":
            rooms |= {alias.name for alias in node.names if alias.name in FLOORS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megafork."):
            rooms.add(_room(node.module or ""))
        elif isinstance(node, ast.Import):
            rooms |= {_room(alias.name) for alias in node.names if alias.name.startswith("megafork.")}
    return rooms


def test_imports_run_one_way() -> None:
    for file in PACKAGE.rglob("*.py"):
        room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in _imports(file) - {room}:
            same_ground = room in GROUND_FLOOR and other in GROUND_FLOOR
            assert FLOORS[other] < FLOORS[room] or same_ground, f"{file.relative_to(PACKAGE)} (floor {FLOORS[room]}) imports {other}"


def test_no_file_is_a_grab_bag() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert file.stem not in ("utils", "helpers", "misc", "common"), file
        assert len(file.read_text().splitlines()) <= 400, f"{file} holds more than one idea"
