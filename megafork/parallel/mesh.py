"""The process groups of a run, from the recipe's `parallel:` section. Megatron's own groups are the only global state."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

from megafork.parallel import meeting
from megafork.recipe import Parallel
from megafork.shape import check_world


@dataclass(frozen=True)
class Mesh:
    """This rank's place in the layout and the groups it belongs to.

    Ranks are laid out in Megatron's order: tp fastest, then cp, dp, pp. `dp` is the world size divided by tp x pp x cp.
    """

    rank: int
    world: int
    device: torch.device
    layout: Parallel
    dp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
    dp_rank: int

    @property
    def tp_group(self) -> dist.ProcessGroup:
        """Ranks that share each layer's weights."""
        return mpu.get_tensor_model_parallel_group()

    @property
    def cp_group(self) -> dist.ProcessGroup:
        """Ranks that share each sequence's tokens."""
        return mpu.get_context_parallel_group()

    @property
    def token_group(self) -> dist.ProcessGroup:
        """DP x CP: ranks that together hold every token once. Losses and thresholds are reduced over it."""
        return mpu.get_data_parallel_group(with_context_parallel=True)

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the head, and so computes log-probs and entropies."""
        return self.pp_rank == self.layout.pp - 1

    @property
    def rank_in_stage(self) -> int:
        """This rank's number among those of its pipeline stage."""
        return self.rank % (self.world // self.layout.pp)

    def sharing_group(self, *, experts: bool) -> dist.ProcessGroup:
        """Ranks of this stage that together hold its parameters once: those of the experts, or all others."""
        return mpu.get_expert_tensor_and_model_parallel_group() if experts else self.tp_group

    def dp_rank_of(self, rank: int) -> int:
        """The DP rank of any global rank."""
        return rank // (self.layout.tp * self.layout.cp) % self.dp

    @property
    def is_rank_zero(self) -> bool:
        return self.rank == 0


def join_world(device: torch.device | None = None, timeout: timedelta = timedelta(minutes=30)) -> torch.device:
    """Join the default process group that the environment describes (`meeting.join`); every rank must call.

    Returns this rank's device: its GPU by LOCAL_RANK, or the CPU with gloo.
    """
    if device is None:
        local = int(os.environ.setdefault("LOCAL_RANK", "0"))  # vLLM needs it
        device = torch.device("cuda", local % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    if not dist.is_initialized():
        meeting.join("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout)
    return device


def build_mesh(layout: Parallel, *, seed: int, device: torch.device) -> Mesh:
    """Create Megatron's process groups; every rank of the world must call. Raises RecipeError when the world does not fit the layout."""
    world = dist.get_world_size()
    check_world(layout, world)
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    mpu.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.expert_tp,
        create_gloo_process_groups=device.type == "cuda",
    )
    model_parallel_cuda_manual_seed(seed)
    return Mesh(
        rank=dist.get_rank(),
        world=world,
        device=device,
        layout=layout,
        dp=world // layout.model_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        pp_rank=mpu.get_pipeline_model_parallel_rank(),
        cp_rank=mpu.get_context_parallel_rank(),
        dp_rank=mpu.get_data_parallel_rank(),
    )
