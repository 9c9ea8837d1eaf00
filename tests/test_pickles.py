"""An untrusted checkpoint executes no code, whichever reader opens it: not from its index, its plain values, or its shards."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import on_ranks
from safetensors.torch import load_file
from tiny import recipe, save_model
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex
from training import Rig

from megafork.compat import pickles
from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.convert.torch_dist import DistReader
from megafork.model.build import PolicyConfig, build_policy
from megafork.parallel.mesh import build_mesh
from megafork.recipe import Parallel, Recipe, RecipeError
from megafork.shape import read_shape
from megafork.weights import checkpoint
from megafork.weights.checksums import SUMS, sum_of


class Exploit:
    """Runs a command in whatever process unpickles it."""

    def __init__(self, mark: Path) -> None:
        self.command = f"touch {mark}"

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


class Evaluated(Exploit):
    def __reduce__(self) -> Any:
        return eval, (f"__import__('os').system({self.command!r})",)


class Somebodys:
    """A class of somebody else's package."""


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    return tmp_path / "pwned"


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    save_model(tmp_path / "model")
    hf_to_megatron(tmp_path / "model", tmp_path / "megatron")
    return tmp_path / "megatron"


def _sum_again(folder: Path) -> None:
    """As an attacker would."""
    sums = {str(file.relative_to(folder)): sum_of(file) for file in folder.rglob("*") if file.is_file() and file.name != SUMS}
    (folder / SUMS).write_text(json.dumps(sums))


def _change_index(folder: Path, change: Callable[[Metadata], Any]) -> None:
    index = pickle.loads((folder / ".metadata").read_bytes())
    (folder / ".metadata").write_bytes(pickle.dumps(change(index) or index))
    _sum_again(folder)


def _replace_chunk(folder: Path, key: str, value: Any) -> None:
    """Append another value to a file, and have the index say that it is the one of `key`."""

    def change(index: Metadata) -> None:
        for name, where in index.storage_data.items():
            if name.fqn == key:
                with (folder / where.relative_path).open("ab") as file:
                    where.offset = file.tell()
                    torch.save(value, file)
                    where.length = file.tell() - where.offset

    _change_index(folder, change)


def _hide_in_plan(exploit: Any) -> Callable[[Metadata], None]:
    def change(index: Metadata) -> None:
        index.planner_data = {"embedding": (0, [exploit])}

    return change


INDEXES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a call": (lambda mark: lambda index: Exploit(mark), "posix.system"),
    "a call of eval": (lambda mark: lambda index: Evaluated(mark), "builtins.eval"),
    "hidden in a real one": (lambda mark: _hide_in_plan(Exploit(mark)), "posix.system"),
    "an instance of an unknown class": (lambda mark: _hide_in_plan(Somebodys()), "test_pickles.Somebodys"),
}


@pytest.mark.parametrize("kind", INDEXES)
def test_an_index_is_not_run_by_a_conversion(kind: str, converted: Path, mark: Path, tmp_path: Path) -> None:
    change, named = INDEXES[kind]
    _change_index(converted, change(mark))
    with pytest.raises(RecipeError, match=f"its index names {named}, which no index needs") as error:
        megatron_to_hf(converted, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text",
    [
        b"cposix\nsystem\n(Vtouch MARK\ntR.",
        b"\x80\x04\x8c\x25torch.distributed.checkpoint.metadata\x8c\x1fMetadata.__init__.__globals__.x\x93.",  # a way through a known class
        b"cbuiltins\ngetattr\n(cposix\nsystem\nVx\ntR.",
        b"ctorch\nload\n(VMARK\ntR.",  # a function of torch's, where its dtypes are known
    ],
)
def test_pickles_written_by_hand(text: bytes, mark: Path) -> None:
    with pytest.raises(pickles.ForbiddenType):
        pickles.read_index(io.BytesIO(text.replace(b"MARK", str(mark).encode())))
    assert not mark.exists()


def test_getattr_gives_members_of_enums_alone() -> None:
    member = b"cbuiltins\ngetattr\n(ctorch.distributed.checkpoint.planner\nWriteItemType\nVSHARD\ntR."
    assert pickles.read_index(io.BytesIO(member)).name == "SHARD"
    for other in (b"ctorch.distributed.checkpoint.metadata\nMetadata\nV__init__", b"ctorch\nSize\nV__reduce__"):
        with pytest.raises(pickles.ForbiddenType):
            pickles.read_index(io.BytesIO(b"cbuiltins\ngetattr\n(" + other + b"\ntR."))


@pytest.mark.parametrize("name", ["../outside", "/dev/zero", "sub/../../x"])
def test_an_index_of_files_elsewhere_is_refused(name: str, converted: Path) -> None:
    def change(index: Metadata) -> None:
        next(iter(index.storage_data.values())).relative_path = name

    _change_index(converted, change)
    with pytest.raises(ValueError, match="is elsewhere"):
        DistReader(converted)


@pytest.mark.parametrize("index", [{}, Metadata({}), Metadata(state_dict_metadata=None, storage_data={}), [1]])  # type: ignore[arg-type]
def test_an_index_that_is_none_is_refused_in_a_line(index: Any, converted: Path, tmp_path: Path) -> None:
    _change_index(converted, lambda _: index or {"x": 1})
    with pytest.raises(RecipeError):
        megatron_to_hf(converted, tmp_path / "out")


@pytest.mark.parametrize("value", ["call", "list"])
def test_a_chunk_that_is_no_tensor_is_not_run(value: str, converted: Path, mark: Path, tmp_path: Path) -> None:
    _replace_chunk(converted, "decoder.final_layernorm.weight", Exploit(mark) if value == "call" else [1, 2])
    with pytest.raises(RecipeError, match=r"__0_0\.distcp' holds (posix\.system|no tensor) in place of decoder\.final_layernorm\.weight"):
        megatron_to_hf(converted, tmp_path / "out")
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_what_others_write_down_beside_the_tensors_is_not_asked_for(converted: Path, tmp_path: Path) -> None:
    """NeMo and Megatron-LM keep arguments, enums and configs of their own classes in common.pt, and other values in the shards."""
    torch.save({"args": Namespace(lr=1e-3), "config": Somebodys(), "iteration": 7}, converted / "common.pt")
    _replace_chunk(converted, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", Somebodys())
    megatron_to_hf(converted, tmp_path / "out")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "out"))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


class MCoreMetadata(Metadata):
    """What older versions of megatron-core write in the place of torch's."""


def test_an_index_of_an_older_megatron(converted: Path, tmp_path: Path) -> None:
    index = pickle.loads((converted / ".metadata").read_bytes())
    older = MCoreMetadata(**vars(index))
    older.mcore_data = {"decoder.final_layernorm.weight": {"nd_reformulated_orig_global_shape": (64,)}}  # type: ignore[attr-defined]
    text = pickle.dumps(older, protocol=2).replace(
        b"ctest_pickles\nMCoreMetadata", b"cmegatron.core.dist_checkpointing.strategies.torch\nMCoreMetadata"
    )
    (converted / ".metadata").write_bytes(text)
    _sum_again(converted)
    megatron_to_hf(converted, tmp_path / "out")


# ---- what megatron-core and torch read for us


def _load_all(spec: Recipe, folders: list[Path]) -> list[str]:
    """What a run that continues says of each checkpoint."""
    rig = Rig(spec)
    said = []
    for folder in folders:
        checkpoints = checkpoint.Checkpoints(folder.parent, rig.mesh, keep_last=2)
        try:
            checkpoints.load(int(folder.name[5:]), rig.learner.chunks, rig.learner.optimizer)
            said.append("loaded")
        except RecipeError as error:
            said.append(str(error))
    return said


def _save(spec: Recipe, folder: Path, count: int) -> None:
    rig = Rig(spec)
    for step in range(1, count + 1):
        checkpoint.Checkpoints(folder, rig.mesh, keep_last=count).save(step, rig.learner.chunks, rig.learner.optimizer, {"answer": 42})


def test_a_run_that_continues_runs_nothing_of_its_checkpoint(tmp_path: Path, mark: Path) -> None:
    spec = recipe(save_model(tmp_path / "m"), train={"micro_batch_tokens": 64})
    on_ranks(1, _save, spec, tmp_path / "checkpoints", 5)
    folders = sorted((tmp_path / "checkpoints").iterdir())
    _change_index(folders[0], _hide_in_plan(Exploit(mark)))
    torch.save({**torch.load(folders[1] / "common.pt"), "run": Exploit(mark)}, folders[1] / "common.pt")
    _sum_again(folders[1])
    _replace_chunk(folders[2], "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", [Exploit(mark)])
    _replace_chunk(folders[3], "decoder.final_layernorm.weight", Exploit(mark))
    for said in on_ranks(2, _load_all, spec, folders):
        assert said[4] == "loaded"
        for line in said[:4]:
            assert "holds posix.system, which no" in line and "\n" not in line
    with pytest.raises(RecipeError, match=r"holds posix\.system"):
        checkpoint.read_state(folders[1])
    assert not mark.exists()


def _states_that_arrive(spec: Recipe, folder: Path) -> Any:
    """The extra states that the model's linears are given, and how its weights differ from the model's."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    given: list[Any] = []
    ColumnParallelLinear.set_extra_state = lambda self, state: given.append(state)
    rig = Rig(spec)
    before = rig.weights()
    checkpoint.load_weights(folder, rig.learner.chunks, rig.mesh)
    return given, max(float((before[name] - tensor).abs().max()) for name, tensor in rig.weights().items())


def test_no_module_is_given_bytes_to_unpickle(converted: Path, tmp_path: Path, mark: Path) -> None:
    """Transformer Engine's linears unpickle the extra state that they are given. Nor is common.pt asked for where weights are enough."""
    torch.save({"config": Somebodys()}, converted / "common.pt")
    _replace_chunk(converted, "decoder.layers.mlp.linear_fc1._extra_state/shard_0_4", [io.BytesIO(pickle.dumps(Exploit(mark)))])
    [(given, difference)] = on_ranks(1, _states_that_arrive, recipe(tmp_path / "model"), converted)
    assert [state for state in given if state is not None] == [] and difference == 0.0 and not mark.exists()


def _unpatched(folder: Path, mark: Path) -> list[bool]:
    """Which of the ways in torch and megatron-core still run what they read."""
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
    from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    torch.save(Exploit(mark), folder / "common.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Exploit(mark)))
    value = (folder / "common.pt").read_bytes()
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    planner.set_up_planner({"x": 1}, Metadata({"x": BytesStorageMetadata()}))
    size, index = torch.Size([]), MetadataIndex("x")
    item = ReadItem(LoadItemType.BYTE_IO, index, size, index, size, size)
    ran = []
    for patched in (False, True):
        if patched:
            pickles.install()
        ways: list[Callable[[], Any]] = [
            lambda: FileSystemReader(folder).read_metadata(),
            lambda: planner.load_bytes(item, io.BytesIO(value)),
            lambda: (pickles.CommonValues if patched else TorchCommonLoadStrategy)().load_common(str(folder)),  # noqa: B023
        ]
        for way in ways:
            with contextlib.suppress(pickle.UnpicklingError, AttributeError):
                way()
            ran.append(mark.exists())
            mark.unlink(missing_ok=True)
    return ran


def test_torch_and_megatron_still_run_what_they_read(tmp_path: Path, mark: Path) -> None:
    """A False among the first three: that part of compat/pickles.py can go."""
    [ran] = on_ranks(1, _unpatched, tmp_path, mark)
    assert ran == [True, True, True, False, False, False]


def _alone(folder: Path, like: Path) -> str:
    mesh = build_mesh(Parallel(), seed=1, device=torch.device("cpu"))
    chunks = build_policy(read_shape(like), PolicyConfig.of(recipe(like)), mesh)
    try:
        checkpoint.load_weights(folder, chunks, mesh)
    except RecipeError as error:
        return str(error)
    return "loaded"


def test_an_index_is_not_run_by_an_analysis(converted: Path, tmp_path: Path, mark: Path) -> None:
    _change_index(converted, _hide_in_plan(Evaluated(mark)))
    assert "holds builtins.eval, which no" in on_ranks(1, _alone, converted, tmp_path / "model")[0]
    assert not mark.exists()
