"""A conversion's memory."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import edit_json
from ranks import on_ranks
from tiny import save_model
from torch import Tensor

from megafork.convert.convert import Converted, hf_to_megatron, megatron_to_hf
from megafork.shape import read_shape
from megafork.weights.shards import Spec, write_shards


def _peak(convert: Callable[..., Converted], source: Path, target: Path, options: dict[str, Any]) -> int:
    """Bytes that a conversion adds to those of the process, at most."""

    def resident(what: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))

    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    convert(source, target, **options)
    return resident("VmHWM") - before


def _large_model(folder: Path) -> int:
    """About 1 GB of random bits in bf16, none of them of NaN; the bytes of its largest layer (the embedding counts as one)."""
    save_model(folder, hidden_size=64, intermediate_size=64, num_hidden_layers=1)
    (folder / "model.safetensors").unlink()
    sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64}
    edit_json(folder / "config.json", **sizes, num_hidden_layers=8, vocab_size=50_000, dtype="bfloat16", layer_types=None)
    from megafork.weights.mapping import huggingface_shapes

    shapes = huggingface_shapes(read_shape(folder))

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, size in shapes.items():
            yield name, torch.empty(size, dtype=torch.int16).random_(0x7F80).view(torch.bfloat16)

    write_shards(folder, [Spec(name, size, torch.bfloat16) for name, size in shapes.items()], tensors(), shard_bytes=512 << 20)
    layer = sum(2 * math.prod(size) for name, size in shapes.items() if name.startswith("model.layers.0."))
    return max(layer, 2 * math.prod(shapes["model.embed_tokens.weight"]))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_memory_stays_under_two_layers(tmp_path: Path) -> None:
    largest = _large_model(tmp_path / "in")
    whole = sum(file.stat().st_size for file in (tmp_path / "in").glob("*.safetensors"))
    assert whole > 4 * largest, "a conversion that holds the model is found"
    for function, source, target, options in ((hf_to_megatron, "in", "megatron", {"tp": 2}), (megatron_to_hf, "megatron", "out", {})):
        [peak] = on_ranks(1, _peak, function, tmp_path / source, tmp_path / target, options)
        assert 0 < peak < 2 * largest, f"{function.__name__}: {peak >> 20} MiB, two layers are {2 * largest >> 20}"
        shutil.rmtree(tmp_path / source)  # 1 GB
