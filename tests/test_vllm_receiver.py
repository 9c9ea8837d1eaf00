"""The end of a weight transfer in vLLM's workers, without a server."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fp8 import EXPERTS
from ranks import free_port, on_ranks
from torch import Tensor
from vllm_engines import UPDATES, Answers, ask, assert_equal, fresh, models, start_vllm, tensors

from megafork.compat import vllm_fp8
from megafork.convert.convert import megatron_to_hf
from megafork.model.fp8 import Quantized
from megafork.rollout.transfer import GlooLink, buckets, describe
from megafork.shape import read_shape

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_weights_over_gloo_equal_those_from_disk(tmp_path: Path) -> None:
    """An untied mixture of experts in an engine of TP 2; the tied, dense model is at the servers below."""
    folders = models(tmp_path, architecture="Qwen3Moe", tie_word_embeddings=False)[:2]
    want = on_ranks(1, fresh, folders, free_port(), engines=True)[0]
    for rank, problems in on_ranks(2, receive, folders, 2, free_port(), engines=True):
        for answers, model in zip(rank, UPDATES, strict=True):
            assert_equal(answers, want[model % 2])
        assert rank[0] == rank[2]
        assert problems == [None, "not all weights were sent of model.layers.1.mlp.experts.routed_experts"]


def test_fp8_weights_over_gloo_equal_those_from_disk(tmp_path: Path) -> None:
    """A mixture whose engine of two ranks shares the experts, bit for bit."""
    sizes = {**EXPERTS, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    folders = models(tmp_path, architecture="Qwen3Moe", dtype=torch.bfloat16, **sizes)[:2]
    for folder in folders:
        megatron_to_hf(folder, folder / "fp8", fp8=True)
    how: dict[str, Any] = {"enable_expert_parallel": True, "dtype": "bfloat16"}
    want = on_ranks(
        2, partial(fresh_in_fp8, tensor_parallel_size=2, **how), [folder / "fp8" for folder in folders], free_port(), engines=True
    )[0]
    received = on_ranks(2, partial(receive, fp8=True, **how), folders, 2, free_port(), engines=True)
    for rank, _ in received:
        assert rank == [want[model % 2] for model in UPDATES] and rank[0] != rank[1]
    left_out = "not all weights were sent of model.layers.1.mlp.experts.routed_experts"
    assert [problems for _, problems in received] == [[None, None], [None, left_out]], "the second rank holds that expert"


def fresh_in_fp8(folders: list[Path], port: int, **arguments: Any) -> list[list[Answers]]:
    vllm_fp8.install()
    return fresh(folders, port, **arguments)


def receive(
    folders: list[Path], tp: int, port: int, *, fp8: bool = False, **arguments: Any
) -> tuple[list[list[Answers]], list[str | None]]:
    """The answers after each update, and what is wrong with an update before its end: with a whole one, and one without an expert."""

    def sent_of(folder: Path) -> list[tuple[str, Tensor]]:
        return list(Quantized(tensors(folder), read_shape(folder))) if fp8 else tensors(folder)

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    llm = start_vllm(
        folders[0] / "fp8" if fp8 else folders[0],
        load_format="dummy",
        tensor_parallel_size=tp,
        **arguments,
        weight_transfer_config={"backend": "gloo"},
        worker_extension_cls="megafork.rollout.receiver.Receiver",
    )
    rank = torch.distributed.get_rank()
    link = GlooLink("127.0.0.1", tp, 30.0) if rank == 0 else None
    info = [link.init_info if link else None]
    torch.distributed.broadcast_object_list(info)
    answers = []
    with ThreadPoolExecutor() as trainer:
        joined = trainer.submit(link.join) if link else None
        llm.init_weight_transfer_engine({"init_info": info[0]})
        if joined:
            joined.result()

        def update(weights: list[tuple[str, Tensor]], version: int) -> str | None:
            llm.start_weight_update()
            for bucket in buckets(weights):
                sent = trainer.submit(link.send, bucket) if link else None
                llm.update_weights({"update_info": describe(bucket)})
                if sent:
                    sent.result()
            [state] = llm.collective_rpc("weight_update_state")
            llm.finish_weight_update(str(version))
            llm.reset_prefix_cache()
            return state["problem"]

        for version, model in enumerate(UPDATES):
            problem = update(sent_of(folders[model % 2]), version)
            answers.append(ask(llm))
        without = [(name, tensor) for name, tensor in sent_of(folders[0]) if "1.mlp.experts.3.up_proj" not in name]
        return answers, [problem, update(without, len(UPDATES))]
