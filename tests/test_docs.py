"""The documentation is current: generated pages match what their program writes, and everything that pages link to exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megafork.shape import FAMILIES
from tools import recipe_page

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]


def test_the_page_of_keys_is_what_the_schema_says() -> None:
    assert recipe_page.PAGE.read_text() == recipe_page.render(), "write it again: python tools/recipe_page.py"


def test_the_families_listed_are_those_of_the_table() -> None:
    rows = [f"| {family.models} | `{architecture}` |" for architecture, family in FAMILIES.items()]
    assert "\n".join(["| models | `architectures` |", "|---|---|", *rows, "\n"]) in (ROOT / "docs/convert.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_keys_that_pages_name_exist(page: Path) -> None:
    from megafork.recipe import Recipe

    others = {"data.train_batch_size"}  # verl's
    for section, key in re.findall(r"`([a-z]+)\.([a-z_]+)(?:=[^`]*)?`", page.read_text()):
        field = Recipe.model_fields.get(section)
        if field is not None and f"{section}.{key}" not in others:
            assert key in field.annotation.model_fields, f"{section}.{key}"  # type: ignore[union-attr]
