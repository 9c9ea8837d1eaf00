"""Quantisation by nvidia-modelopt if it is installed, and the message if it is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from fp8 import PROMPTS, WIDE, reference, score
from ranks import on_ranks
from tiny import save_model

from megafork.convert.convert import hf_to_megatron, megatron_to_hf
from megafork.recipe import RecipeError

HERE = importlib.util.find_spec("modelopt") is not None


def _convert(folder: Path) -> None:
    hf_to_megatron(folder / "in", folder / "megatron")
    megatron_to_hf(folder / "megatron", folder / "out", quantize="fp8_per_channel")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quantize": "int3"}, r"^--quantize is 'int3': choose one of fp8_per_channel, "),
        ({"quantize": "fp8_blocks", "fp8": True}, r"^--quantize is 'fp8_blocks' and --fp8 is set"),
        ({"quantize": "fp8_blocks", "verify": True}, r"^--quantize is 'fp8_blocks' and --verify is set"),
        pytest.param(
            {"quantize": "fp8_blocks"},
            r"nvidia-modelopt is not installed: pip install 'megafork\[quantize\]'",
            marks=pytest.mark.skipif(HERE, reason="nvidia-modelopt is installed"),
        ),
    ],
)
def test_what_cannot_be_done_is_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        megatron_to_hf(tmp_path / "in", tmp_path / "out", **options)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not HERE, reason="nvidia-modelopt is not installed (megafork[quantize])")
def test_vllm_loads_what_modelopt_writes(tmp_path: Path) -> None:
    source = save_model(tmp_path / "in", dtype=torch.bfloat16, num_hidden_layers=1, **WIDE)
    (source / "tokenizer.json").write_text("{}")
    on_ranks(1, _convert, tmp_path)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "out" / "plain").exists()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "modelopt"
    difference = (torch.tensor(score(tmp_path / "out", "with")) - torch.stack(reference(source, fp8=False))).abs().mean()
    assert 0.02 < difference < 0.3, f"quantised, and the model still: {len(PROMPTS)} prompts differ by {difference}"
