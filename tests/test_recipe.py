"""The recipe: strict, composed with `extends:` and overrides, and clear about what is wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from least_recipe import LEAST, recipe

from megafork.recipe import Profile, Recipe, RecipeError
from megafork.recipe_file import load_recipe

__all__ = ["recipe"]

WRONG = {
    "forks.top_entropy_quantile=1.5": "forks.top_entropy_quantile is 1.5: must be a number, above 0 and at most 1",
    "forks.top_entropy_quantile=0": "forks.top_entropy_quantile is 0: must be a number, above 0 and at most 1",
    "train.steps=true": "train.steps is true: must be a whole number, at least 1",
    "train.steps=5.0": "train.steps is 5.0: must be a whole number, at least 1",
    "train.steps=1e3": "train.steps is '1e3': must be a whole number, at least 1",
    "train.steps=null": "train.steps is null: must be a whole number, at least 1",
    "train.steps=": "train.steps is null: must be a whole number, at least 1",
    "optimizer.lr=true": "optimizer.lr is true: must be a number, above 0",
    "optimizer.lr=.nan": "optimizer.lr is nan: must be a number, above 0",
    "optimizer.grad_clip=inf": "optimizer.grad_clip is inf: must be a number, at least 0 (a finite one)",
    "optimizer.lr='nan'": "optimizer.lr is nan: must be a number, above 0",
    "rollout.temperature=.inf": "rollout.temperature is inf: must be a number, at least 0.01 and at most 100",
    "rollout.fork_temperature=[0.7,1]": "rollout.fork_temperature is [0.7, 1]: must be a list of 3 (a number, at least 0.01 and "
    "at most 100; a number, at least 0.01 and at most 100; a number, at least 0) or null",
    "rollout.fork_temperature=[0.7,0,1]": "rollout.fork_temperature is 0: must be a list of 3 (a number, at least 0.01 and",
    "optimizer.betas=[0.9]": "optimizer.betas is [0.9]: must be a list of 2, each a number, at least 0 and below 1",
    "optimizer.betas=[0.9,1]": "optimizer.betas is 1: must be a list of 2, each a number, at least 0 and below 1",
    "optimizer.min_lr=1e-7": "optimizer.min_lr is 1e-07 with optimizer.decay=constant: nothing falls to it; set decay=cosine or",
    "optimizer.min_lr=1": "optimizer.min_lr is 1.0 but optimizer.lr is 1e-06: a decay ends at min_lr, choose a smaller one",
    "parallel.sp=1": "parallel.sp is 1: must be true or false",
    "parallel.sp=true": "parallel.sp is true but parallel.tp is 1: set parallel.sp=false, or a tp above 1",
    "forks.select=topp": "forks.select is 'topp': did you mean 'top'?",
    "forks.select=xyzzy": "forks.select is 'xyzzy': known are top, bottom, random, all, prefix, gmts",
    "forks.select=rsi": "forks.rsi_interval is None with forks.select=rsi: give it with select=rsi, and only with it",
    "forks.rsi_interval=[0.5,2]": "forks.rsi_interval is (0.5, 2.0) with forks.select=top: give it with select=rsi, and only with it",
    "forks.stapo=[0.1,0.5]": "forks.stapo is [0.1, 0.5] with forks.select=top: only `stapo` has it; leave it out",
    "forks.rest_weight=1.5": "forks.rest_weight is 1.5: must be a number, at least 0 and at most 1",
    "forks.horvitz_thompson=true": "forks.horvitz_thompson is true with forks.select=top: only `random` and `prefix` select by chance",
    "forks.threshold=0.6": "forks.threshold is 0.6 with forks.scope=minibatch: give a threshold with scope=fixed, and only with it",
    "loss.importance_level=sequence": "loss.importance_level is sequence without loss.importance_cap: no ratio weighs the loss; set a cap",
    "loss.mismatch.token_mask=[2,5]": "loss.mismatch.token_mask is 2: must be a list of 2 (a number, at least 0 and at most 1; a number",
    "loss.mismatch.tokn_mask=[0.5,5]": "unknown key loss.mismatch.tokn_mask = [0.5, 5]: did you mean 'token_mask'?",
    "loss.mismatch.veto=1": "loss.mismatch.veto is 1: must be a number, above 0 and below 1 or null",
    "loss.clip_rest=[0.1,0.1]": "loss.clip_rest is (0.1, 0.1) with forks.rest_weight=0: tokens that are not selected have no loss",
    "loss.kl.rest_coef=0.1": "loss.kl.rest_coef is 0.1 with forks.rest_weight=0: tokens that are not selected have no loss",
    "loss.kl.estimator=k4": "loss.kl.estimator is 'k4': must be one of k1, k2, k3",
    "loss.clip_cov=[0.1,5,1]": "loss.clip_cov is [0.1, 5.0, 1.0]: low must not exceed high",
    "loss.kl_cov=[0.1,1]": "loss.kl_cov is [0.1, 1.0] with train.minibatches=1: at a step's first update the policy is p_old",
    "loss.kl_cov=[0.1]": "loss.kl_cov is [0.1]: must be a list of 2",
    "loss.dual_clip=1": "loss.dual_clip is 1: must be a number, above 1 or null",
    "train.minibatches=3": "train.minibatches is 3 but rollout.prompts is 512: choose a number of mini-batches that divides the prompts",
    "model.path=null": "model.path is null: must be text",
    "data.eval=./d.jsonl": "data.eval is './d.jsonl', the same as data.train: hold out other prompts, or leave data.eval unset",
    "run.name=../x": "run.name is '../x': it names a folder, use up to 128 letters, digits, `_`, `-` and `.`",
    "rollout.servers=http://a:8000": "rollout.servers is 'http://a:8000': must be a list, each text",
    "rollout.servers=[a:8000]": "rollout.servers has 'a:8000': give addresses such as http://node1:8000",
    "rollout.servers=[http://a:99999]": "rollout.servers has 'http://a:99999': give addresses such as http://node1:8000",
    "rollout.servers=[http://me@a:80]": "rollout.servers has 'http://me@a:80': give addresses such as http://node1:8000",
    "rollout.servers=[http://a:1,http://a:1]": "rollout.servers is ['http://a:1', 'http://a:1']: it names a server twice",
    "rollout.staleness=1": "rollout.staleness is 1 without rollout.servers: engines in the trainer's own processes",
    "train.stps=5": "unknown key train.stps = 5: did you mean 'steps'?",
    "tran.steps=5": "unknown section 'tran': did you mean 'train'?",
    "zzz.steps=5": "unknown section 'zzz': known are run, model, parallel, data",
    "train.steps": "override 'train.steps' is not of the form section.key=value, for example train.steps=5",
    "train.steps=2024-99-99": "train.steps is '2024-99-99': must be a whole number, at least 1",
    "train.steps=2024-09-09": "train.steps is '2024-09-09': must be a whole number, at least 1",
    "train.steps=!!int abc": "train.steps is '!!int abc': must be a whole number, at least 1",
    "train.steps=1:30": "train.steps is '1:30': must be a whole number, at least 1",
    "train.steps=0x10": "train.steps is '0x10': must be a whole number, at least 1",
    "train.steps=" + "9" * 5000: f"train.steps is '{'9' * 99}...{'9' * 19}': must be a whole number, at least 1",
    "train.steps=" + "[" * 2000: f"train.steps is '{'[' * 99}...{'[' * 19}': must be a whole number, at least 1",
    "train.steps=2147483648": "train.steps is 2147483648: must be a whole number, at least 1",
    "run.seed=9223372036854775808": "run.seed is 9223372036854775808: must be a whole number, at least 0 and at most 9223372036854775807",
    "run.seed=18446744073709551616": "run.seed is 18446744073709551616: must be a whole number",
    "run.ranks=100000": "run.ranks is 100000: must be a whole number, at least 1 and at most 1024 or null",
    "run.name=" + "a" * 300: f"run.name is '{'a' * 99}...{'a' * 19}': it names a folder, use up to 128 letters",
    "parallel.tp=1000000000": "parallel.tp is 1000000000: must be a whole number, at least 1 and at most 65536",
    "rollout.prompts=1000000000000": "rollout.prompts is 1000000000000: must be a whole number, at least 1 and at most 1048576",
    "rollout.samples=60000": "rollout.prompts x rollout.samples is 512 x 60000: a step of more than 10,000,000 responses",
    "rollout.max_response_length=99999999999": "rollout.max_response_length is 99999999999: must be a whole number, at least 1 and at most",
    "reward.timeout_s=1e300": "reward.timeout_s is 1e+300: must be a number, above 0 and at most 31536000",
    "log.profile=5": "log.profile is 5: must be a mapping with steps, what or null",
    "log.profile={what: torch}": "log.profile.steps is missing: add it to the recipe or give log.profile.steps=...",
    "log.profile={steps: []}": "log.profile.steps is []: must be a list of at least 1, each a whole number, at least 1",
    "log.profile={steps: 3}": "log.profile.steps is 3: must be a list of at least 1, each a whole number, at least 1",
    "log.profile={steps: [0]}": "log.profile.steps is 0: must be a list of at least 1, each a whole number, at least 1",
    "log.profile={steps: [true]}": "log.profile.steps is true: must be a list of at least 1, each a whole number, at least 1",
    "log.profile={steps: [3], what: nsight}": "log.profile.what is 'nsight': must be one of torch, memory, nsys",
    "log.profile={step: [3]}": "log.profile.steps is missing: add it to the recipe or give log.profile.steps=...; "
    "unknown key log.profile.step = [3]: did you mean 'steps'?",
    "log.profile.what=memory": "log.profile.steps is missing: add it to the recipe or give log.profile.steps=...",
    "log.profile.steps=[3,101]": "log.profile.steps has 101 but train.steps is 100: choose steps that the run has",
    "steps=5": "override 'steps=5' is not of the form section.key=value",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_answered_with_field_value_and_mend(override: str, recipe: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe, [override])
    assert str(caught.value).startswith(WRONG[override])


RIGHT: dict[str, Any] = {
    "optimizer.lr=1e-6": 1e-6,
    "optimizer.lr='2e-6'": 2e-6,
    "rollout.temperature=1": 1.0,
    "optimizer.betas=[9e-1,0.95]": (0.9, 0.95),
    "optimizer.betas=[0,0]": (0.0, 0.0),
    "data.template={prompt}: a=b": "{prompt}: a=b",
    "data.template='{prompt}'": "{prompt}",
    "data.template=[": "[",
    "data.template=Q. {prompt} #1": "Q. {prompt} #1",
    "data.template=## Problem {prompt}": "## Problem {prompt}",
    "data.template=Solve.\n\n{prompt}\nA.": "Solve.\n\n{prompt}\nA.",
    "data.template='{prompt}' # ask": "{prompt}",
    "run.folder=runs #1": "runs #1",
    "loss.clip_cov=[2e-4,-1e3,1e3]": (2e-4, -1e3, 1e3),
    "data.eval=null": None,
    "run.name=007": "007",
    "train.micro_batch_tokens=null": None,
    "parallel.tp=4": 4,
    "forks.select=all": "all",
    "data.template=2024-06-01": "2024-06-01",
    "run.name=no": "no",
    "run.name=0x1F": "0x1F",
    "run.name=1_0": "1_0",
    "run.seed=010": 10,
    "train.steps=1_000": 1000,
    "run.seed=9223372036854775807": 2**63 - 1,
    "rollout.servers=[http://a:8000,http://10.0.0.1:8001]": ["http://a:8000", "http://10.0.0.1:8001"],
}


@pytest.mark.parametrize("override", RIGHT)
def test_overrides(override: str, recipe: Path) -> None:
    recipe.write_text(LEAST + "forks: {select: bottom}\ntrain: {micro_batch_tokens: 99999}\n")
    section, key = override.partition("=")[0].split(".")
    value = getattr(getattr(load_recipe(recipe, [override]), section), key)
    assert value == RIGHT[override] and type(value) is type(RIGHT[override])


def test_a_key_of_keys_is_given_whole_or_one_by_one(recipe: Path) -> None:
    assert load_recipe(recipe).log.profile is None
    for overrides in (["log.profile={steps: [3, 5], what: memory}"], ["log.profile.steps=[3, 5]", "log.profile.what=memory"]):
        loaded = load_recipe(recipe, overrides)
        assert loaded.log.profile == Profile(steps=[3, 5], what="memory")
        recipe.with_name("again.yaml").write_text(loaded.to_yaml())
        assert load_recipe(recipe.with_name("again.yaml")) == loaded
    assert load_recipe(recipe.with_name("again.yaml"), ["log.profile=null"]).log.profile is None


def test_the_last_override_wins_and_sections_agree_only_at_the_end(recipe: Path) -> None:
    loaded = load_recipe(recipe, ["train.minibatches=3", "rollout.prompts=5", "rollout.prompts=6"])
    assert (loaded.train.minibatches, loaded.rollout.prompts) == (3, 6)


@settings(deadline=None)
@given(
    name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,8}", fullmatch=True),
    template=st.none() | st.text(max_size=12).map(lambda text: text + "{prompt}"),
    lr=st.floats(min_value=1e-300, max_value=1e300),
    betas=st.tuples(*[st.floats(0.0, 1.0, exclude_max=True)] * 2),
    seed=st.integers(0, 2**63 - 1),
)
def test_what_is_written_down_reads_back_the_same(
    tmp_path_factory: pytest.TempPathFactory, name: str, template: str | None, lr: float, betas: tuple[float, float], seed: int
) -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"name": name, "seed": seed},
            "model": {"path": "1e5"},
            "data": {"train": "yes", "template": template},
            "optimizer": {"lr": lr, "betas": betas},
        }
    )
    file = tmp_path_factory.getbasetemp() / "written.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(file) == recipe


def test_every_shipped_recipe_is_right() -> None:
    folder = Path(__file__).parents[1] / "recipes"
    files = list(folder.rglob("*.yaml"))
    assert files
    for file in files:
        load_recipe(file)


def test_every_key_says_what_it_means() -> None:
    for name, section in Recipe.model_fields.items():
        for key, field in section.annotation.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{name}.{key}"


def test_a_wrong_recipe_is_answered_without_torch(recipe: Path) -> None:
    program = "import sys; from megafork.recipe_file import load_recipe; load_recipe(sys.argv[1]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program, str(recipe)], check=False).returncode == 0
