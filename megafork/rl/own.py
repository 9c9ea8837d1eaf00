"""The functions that a recipe names, checked before a run: the user's own are called once on made-up tokens."""

from __future__ import annotations

from megafork.recipe import Recipe
from megafork.rl.objectives import check_objective
from megafork.rl.rules import check_rule


def check_functions(recipe: Recipe) -> None:
    """Refuse an objective or a selection rule that is unknown, or one of the user's that does not return what it must. Raises
    RecipeError."""
    check_objective(recipe.loss)
    check_rule(recipe.forks)
