"""The GPUs that the planner knows, and every figure that it assumes. Nothing here was measured by this project unless stated."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megafork.recipe import RecipeError


@dataclass(frozen=True)
class Gpu:
    """One GPU, from its vendor's data sheet; rates are dense peaks, in bytes and FLOP per second."""

    name: str
    memory: int
    """Bytes, as reported by nvidia-smi."""
    flops: float
    """bf16 tensor-core peak."""
    bandwidth: float
    """Memory bandwidth."""
    link: float
    """Bandwidth to another GPU of the node (NVLink), one direction."""


GIB = 2**30
GPUS = {
    # NVIDIA H100 Tensor Core GPU data sheet (SXM5): 989 TFLOP/s bf16, 3.35 TB/s, NVLink 900 GB/s both ways; 81,559 MiB
    "h100": Gpu("h100", 81559 * 2**20, 989e12, 3.35e12, 450e9),
    # NVIDIA H200 data sheet (SXM): the same chip, 4.8 TB/s; 143,771 MiB
    "h200": Gpu("h200", 143771 * 2**20, 989e12, 4.8e12, 450e9),
    # NVIDIA A100 80GB data sheet (SXM4): 312 TFLOP/s bf16, 2.039 TB/s, NVLink 600 GB/s both ways; 81,920 MiB
    "a100": Gpu("a100", 81920 * 2**20, 312e12, 2.039e12, 300e9),
}

GPUS_PER_NODE = 8
NETWORK = 50e9
"""Bytes per second that a GPU sends to another node: one 400 Gb/s adapter per GPU, as in a DGX H100."""

HOST = 50e9
"""Bytes per second between a GPU and its host's memory, each way: PCIe 5.0 x 16 less its overhead, as on an H100 SXM."""

STORAGE = 2e9
"""Bytes per second that a node writes to the shared file system. Assumed."""
GLOO = 1e9
"""Bytes per second that a rank exchanges between host memories, over TCP. Assumed."""

# Achieved shares of the peaks. Assumed, and set once so that NeMo-RL's published step (Qwen3-32B, 32 x H100, 376 s) comes out about right.
MATMUL_SHARE = 0.50
FP8_GAIN = 1.4
"""Speedup of a projection's matmul in FP8 over bf16, including the quantisation of its operands (the peak is twice as high)."""
ATTENTION_SHARE = 0.35
DECODE_SHARE = 0.60
STREAM_SHARE = 0.84
"""Of the memory's bandwidth, in operators that only read and write: 2.8 of an H100's 3.35 TB/s."""
LINK_SHARE = 0.60

EXPERT_SHARE = 0.5
"""What experts reach of these shares in matmuls and in decoding, for theirs are many and small. Assumed, and set once so that NeMo-RL's
published steps of Qwen3-30B-A3B and 235B-A22B come out about right (`docs/plan.md`)."""
BUSIEST = 1.25
"""Tokens that the rank with the most of them gets from the routers of a mixture, as a multiple of the mean over the ranks that share the
experts. Assumed, for memory and for time."""

# Memory outside our own tensors. Assumed.
RESERVED = 3 * GIB
"""The driver, the CUDA context, NCCL's buffers, cuBLAS workspaces."""
FRAGMENTS = 0.05
"""Share of the activations that the allocator loses to fragmentation."""
VLLM_OVERHEAD = 3 * GIB
"""vLLM's own activations and CUDA graphs, inside rollout.gpu_memory_fraction."""
VLLM_ASLEEP = 2 * GIB
"""Memory that vLLM keeps on the GPU while it sleeps: CUDA graphs and workspaces."""

# A step's workload and fixed costs. Assumed, except where a source is named.
RESPONSE_SHARE = 0.35
"""Mean response length as a share of the maximum: the paper's Table 2 ends at 7,227 of 20,480 tokens (32B, top 20%)."""
PROMPT_SHARE = 0.10
"""Mean prompt length as a share of the maximum: DAPO-Math's prompts are a few hundred tokens."""
GROUPS_SAMPLED = 1.5
"""Groups sampled per group kept by dynamic sampling; the others are all right or all wrong."""
DECODE_STEP = 4e-3
"""Seconds of a decoding step not accounted for by bandwidth or arithmetic: launches, sampling, scheduling."""
ALL_REDUCE_LATENCY = 15e-6
"""Seconds of a small all-reduce between the GPUs of a node."""
FAR_ALL_REDUCE_LATENCY = 40e-6
"""The same between the GPUs of several nodes."""


def gpu_named(name: str) -> Gpu:
    """The GPU with this name. Raises RecipeError if the planner does not know it."""
    known = GPUS.get(name.lower())
    if known is None:
        raise RecipeError(f"--gpu is {name!r}: the planner knows {', '.join(GPUS)}; choose the closest")
    return known


def gpu_here(name: str, memory: int) -> Gpu:
    """The GPU that its driver calls `name`, with its actual `memory` in bytes. For an unknown GPU only the memory is right."""
    known = next((gpu for gpu in GPUS.values() if gpu.name in name.lower()), GPUS["h100"])
    return replace(known, memory=memory)
