"""The house: a room imports only from floors below its own (`tools/house.py`, which draws docs/house.svg)."""

from __future__ import annotations

import ast
from pathlib import Path

import megafork
from tools.house import FLOORS as HOUSE
from tools.house import GROUND, PICTURE, floor_of, render

PACKAGE = Path(megafork.__file__).parent
FLOORS = floor_of()


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
            same_ground = FLOORS[room] == FLOORS[other] == 1
            assert FLOORS[other] < FLOORS[room] or same_ground, f"{file.relative_to(PACKAGE)} (floor {FLOORS[room]}) imports {other}"


def test_no_file_is_a_grab_bag() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert file.stem not in ("utils", "helpers", "misc", "common"), file
        assert len(file.read_text().splitlines()) <= 350, f"{file} holds more than one idea"


def test_the_picture_shows_every_room() -> None:
    rooms = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert rooms - {"__init__"} == {*GROUND, *(room for floor in HOUSE for room in floor)}
    assert PICTURE.read_text() == render(PACKAGE), "run python tools/house.py"
