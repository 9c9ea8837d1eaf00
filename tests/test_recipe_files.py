"""Recipe files: what is wrong in one, aliases, sections, and one that extends another."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from least_recipe import LEAST, recipe

from megafork.recipe import Recipe, RecipeError
from megafork.recipe_file import load_recipe

__all__ = ["recipe"]

FILES = {
    LEAST + "forks: {select: gmts, scope: fixed, threshold: 0.5}\n": (
        "forks.select is gmts with forks.scope=fixed: a fixed threshold in nats selects `top` or `bottom`"
    ),
    LEAST + "forks: {select: prefix}\nloss: {mismatch: {veto: 1e-4}}\n": (
        "loss.mismatch.veto is 0.0001 with forks.select=prefix: the ratio of a response needs all its tokens"
    ),
    LEAST + "forks: {select: prefix}\nloss: {importance_cap: 2, importance_level: geometric}\n": (
        "loss.importance_level is geometric with forks.select=prefix: the ratio of a response needs all its tokens"
    ),
    LEAST + "loss: {old_log_prob: rollout, mismatch: {token_mask: [0.5, 2]}}\n": "loss.mismatch has a mask with loss.old_log_prob=rollout",
    LEAST + "loss: {old_log_prob: current, mismatch: {geometric_mask: [0.5, 2]}}\n": (
        "loss.mismatch.geometric_mask is (0.5, 2.0) with loss.old_log_prob=current: the ratio of a response needs all its tokens' log-probs"
    ),
    LEAST + "forks: {rest_weight: 1}\nloss: {objective: gspo, clip_rest: [0.1, 0.1]}\n": (
        "loss.clip_rest is [0.1, 0.1] with loss.objective=gspo: only `clip` has it; leave it out"
    ),
    LEAST + "loss: {kl: {coef: 0.1}}\nrollout: {fork_temperature: [0.7, 1, 0.6]}\n": (
        "loss.kl.coef is 0.1 with rollout.fork_temperature: the reference has no temperature of its own"
    ),
    LEAST + "loss: {kl: {coef: 0.1}}\nprecision: {train_fp8: true}\n": "loss.kl.coef is 0.1 with precision.train_fp8",
    LEAST + "forks: {select: covariance, scope: sequence}\n": (
        "forks.select is covariance with forks.scope=sequence: all tokens of a response have the same advantage"
    ),
    LEAST + "forks: {select: rsi, rsi_interval: [2, 0.5]}\n": "forks.rsi_interval is [2.0, 0.5]: the first must not exceed the second",
    LEAST + "forks: {select: random, horvitz_thompson: true}\n": "forks.horvitz_thompson is true with forks.normalize_by=selected",
    LEAST + "forks: {select: random, horvitz_thompson: true, normalize_by: response, rest_weight: 0.1}\n": (
        "forks.rest_weight is 0.1 with forks.horvitz_thompson: choose one of the two weights"
    ),
    LEAST + "forks: {select: prefix, rest_weight: 0.1}\n": (
        "forks.rest_weight is 0.1 with forks.select=prefix: the tokens after the cut are never scored"
    ),
    "": "model is missing: add the section to the recipe; data is missing: add the section to the recipe",
    "model: {path: m}\ndata: {}\n": "data.train is missing: add it to the recipe or give data.train=...",
    LEAST + "train: 5\n": "train is 5: it must be a section with keys below it",
    LEAST + "- x": "recipe 'recipe.yaml' is not valid YAML",
    "[1, 2]": "recipe 'recipe.yaml' holds list: it must be sections such as `model:` with keys below them",
    LEAST + "train: {steps: 1}\nloss: {}\ntrain: {minibatches: 2}\n": "recipe 'recipe.yaml' is not valid YAML: 'train' is given twice",
    LEAST + "train:\n  steps: 1\n  steps: 2\n": "recipe 'recipe.yaml' is not valid YAML: 'steps' is given twice",
    LEAST + "extends: 5\n": "extends is 5: give one recipe's path, relative to 'recipe.yaml'",
    LEAST + "parallel: {tp: 2, sp: true, cp: 2}\nrollout: {max_response_length: 20481}\ntrain: {micro_batch_tokens: 22530}\n": (
        "train.micro_batch_tokens is 22530 but one sequence may have 22536 tokens"
    ),
    LEAST + "parallel: {first_stage_layers: 3}\n": "parallel.first_stage_layers is 3 but parallel.pp is 1: leave it out",
    LEAST + "rollout: {temperature: 0.5, fork_temperature: [0.5, 1, 0.6]}\n": (
        "rollout.temperature is 0.5 but rollout.fork_temperature replaces it: drop one of them"
    ),
    LEAST + "train: {steps: !!int abc}\n": "recipe 'recipe.yaml' is not valid YAML: it has a tag, !!int: leave it out, in",
    LEAST + "train: {steps: !steps 5}\n": "recipe 'recipe.yaml' is not valid YAML: it has a tag, !steps: leave it out, in",
    LEAST + "run: {name: !!python/object/apply:os.system [ls]}\n": "recipe 'recipe.yaml' is not valid YAML: it has a tag, !!python",
    LEAST + "train: {steps: 2024-99-99}\n": "train.steps is '2024-99-99': must be a whole number, at least 1",
    LEAST + f"train: {{steps: {'9' * 5000}}}\n": "recipe 'recipe.yaml' is not valid YAML: it has a number with too many digits",
    LEAST + f"train: {{steps: {'[' * 3000 + ']' * 3000}}}\n": "recipe 'recipe.yaml' is not valid YAML: its values are nested too deeply",
    LEAST + f"train: {{steps: {'[' * 30 + ']' * 30}}}\n": "recipe 'recipe.yaml' is not valid YAML: it has values nested over 16 deep",
    LEAST + "train: &train {steps: [*train]}\n": "recipe 'recipe.yaml' is not valid YAML: it has values nested over 16 deep",
    "x: &a [1, 1, 1, 1]\n" + "".join(f"x{n}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for n, (a, b) in enumerate(pairwise("abcdefghijk"))): (
        "recipe 'recipe.yaml' is not valid YAML: it has more than 10,000 values, aliases included"
    ),
    LEAST + "train: {[1]: 2}\n": "recipe 'recipe.yaml' is not valid YAML: while constructing a mapping",
    LEAST + "1: {2: 3}\n": "unknown section 1",
    LEAST + "train: {steps: 1}\n---\nmodel: {}\n": "recipe 'recipe.yaml' is not valid YAML: expected a single document",
    "#" * (1 << 20) + "\n" + LEAST: "recipe 'recipe.yaml' is larger than 1 MiB",
    'extends: "a\\0b"\n': "recipe ",
    f"extends: {'y' * 400}\n": "recipe ",
    LEAST + "optimizer: {lr: fast}\ntrain: {steps: 0}\n": "optimizer.lr is 'fast': must be a number, above 0; train.steps is 0: must be",
}


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_file(text: str, recipe: Path) -> None:
    recipe.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    assert str(caught.value).startswith(FILES[text]) and "\n" not in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"x.yaml' does not exist: give the path of a .yaml file"):
        load_recipe(tmp_path / "x.yaml")
    with pytest.raises(RecipeError, match="is not a readable text file"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not a readable text file"):
        load_recipe(tmp_path / "binary.yaml")


def test_a_recipe_that_is_no_file_is_never_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "a.yaml").symlink_to("b.yaml")
    (tmp_path / "b.yaml").symlink_to("a.yaml")
    for name in ("pipe.yaml", "a.yaml", "nul\0.yaml", "y" * 400, "pipe.yaml/x.yaml", "/dev/zero"):
        with pytest.raises(RecipeError, match=r"is not a readable text file: give the path of a \.yaml file$"):
            load_recipe(tmp_path / name)


def test_text_is_text_in_a_file_as_in_an_override(recipe: Path) -> None:
    recipe.write_text("model: {path: 007}\ndata: {train: 2024-06-01, eval: no}\nrun: {name: 1e5, seed: 010}\nrollout: {servers: []}\n")
    loaded = load_recipe(recipe)
    assert (loaded.model.path, loaded.data.train, loaded.data.eval) == ("007", "2024-06-01", "no")
    assert (loaded.run.name, loaded.run.seed) == ("1e5", 10)


def test_aliases_and_merge_keys(recipe: Path) -> None:
    recipe.write_text(LEAST + "train: &t {steps: &n 7}\ncheckpoint: {every: *n}\nrollout: {prompts: *n}\nforks: {<<: {select: all}}\n")
    loaded = load_recipe(recipe)
    assert (loaded.train.steps, loaded.checkpoint.every, loaded.rollout.prompts, loaded.forks.select) == (7, 7, 7, "all")


def test_a_home_folder_is_found(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(recipe.parent))
    assert load_recipe("~/recipe.yaml", ["run.folder=~/x"]).run_folder == recipe.parent / "x/run"
    assert load_recipe("~/recipe.yaml", ["run.folder=~no such user/x"]).run_folder == Path("~no such user/x/run")


def test_an_empty_section_is_its_defaults(recipe: Path) -> None:
    recipe.write_text(LEAST + "forks:\nloss:\n")
    assert load_recipe(recipe) == Recipe.model_validate(yaml.safe_load(LEAST))
    assert load_recipe(recipe, ["forks.select=all"]).forks.select == "all"


def test_a_key_is_set_inside_what_a_runs_recipe_shows_as_unset(recipe: Path) -> None:
    recipe.write_text(load_recipe(recipe).to_yaml())
    profile = load_recipe(recipe, ["log.profile.steps=[3]"]).log.profile
    assert profile is not None and profile.steps == [3]


def test_extends_merges_key_by_key_from_file_to_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base/root.yaml").write_text(
        LEAST + "optimizer: {lr: 1.0e-3, betas: [0.1, 0.2]}\ntrain: {steps: 7}\nforks: {select: all}\n"
    )
    (tmp_path / "base/middle.yaml").write_text("extends: root.yaml\noptimizer: {lr: 2.0e-3}\nforks:\n")
    (tmp_path / "top.yaml").write_text("extends: base/middle.yaml\nmodel: {path: other}\noptimizer: {betas: [0.3, 0.4]}\n")
    loaded = load_recipe(tmp_path / "top.yaml", ["train.steps=9"])
    assert (loaded.model.path, loaded.data.train, loaded.train.steps) == ("other", "d.jsonl", 9)
    assert (loaded.optimizer.lr, loaded.optimizer.betas, loaded.forks.select) == (2e-3, (0.3, 0.4), "all")


def test_extends_merges_key_by_key_inside_sections_too(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(LEAST + "forks: {rest_weight: 1}\nloss: {kl: {coef: 0.1, estimator: k2}}\n")
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nloss: {kl: {rest_coef: 0.2}, mismatch: {veto: 1e-4}}\n")
    loss = load_recipe(tmp_path / "top.yaml").loss
    assert (loss.kl.coef, loss.kl.rest_coef, loss.kl.estimator, loss.mismatch.veto) == (0.1, 0.2, "k2", 1e-4)


def test_extends_in_a_circle_or_to_nowhere(tmp_path: Path) -> None:
    for n in range(40):
        (tmp_path / f"chain{n}.yaml").write_text(f"extends: chain{n + 1}.yaml\n")
    with pytest.raises(RecipeError, match=r"^extends: chain0.yaml extends a chain of more than 32 recipes: join some of them$"):
        load_recipe(tmp_path / "chain0.yaml")
    for name, other in (("a", "b"), ("b", "c"), ("c", "a"), ("self", "self"), ("lost", "nowhere")):
        (tmp_path / f"{name}.yaml").write_text(f"extends: {other}.yaml\n")
    with pytest.raises(RecipeError, match=r"^extends: a.yaml extends itself through c.yaml: break the cycle$"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(RecipeError, match=r"^extends: self.yaml extends itself through self.yaml: break the cycle$"):
        load_recipe(tmp_path / "self.yaml")
    with pytest.raises(RecipeError, match=r"nowhere.yaml', which lost.yaml extends, does not exist"):
        load_recipe(tmp_path / "lost.yaml")
