"""The Triton code that torch.compile generates for a GPU, on a machine without one: Inductor lowers, schedules and writes as it would on an
H100; nothing is compiled or run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

H100 = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    regs_per_multiprocessor=65536,
    warp_size=32,
)


def play_a_gpu() -> None:
    """From here on torch answers as on a machine with an H100. For forked ranks only."""
    from torch._dynamo import device_interface
    from torch.utils import _triton

    cuda: Any = torch.cuda
    interface: Any = device_interface.CudaInterface
    driver: Any = _triton
    cuda.is_available, cuda.device_count, cuda.current_device = lambda: True, lambda: 1, lambda: 0
    cuda.get_device_capability, cuda.get_device_properties = lambda device=None: (9, 0), lambda device=None: H100
    for part in (interface, interface.Worker):
        part.get_device_properties = staticmethod(cuda.get_device_properties)
    driver.triton_hash_with_backend = lambda: "made up"  # it would ask the driver


def generated(function: Callable[..., Any], *shapes: tuple[int, ...]) -> str:
    """The code for a function of bf16 tensors of these shapes."""
    import torch._inductor.lowering
    from torch._inductor.debug import DebugContext
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.graph import GraphLowering
    from torch._inductor.virtualized import V
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = FakeTensorMode()
    values = [torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes]
    inputs: list[Any] = [FakeTensor(mode, value, torch.device("cuda", 0)) for value in values]
    traced = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    graph = GraphLowering(traced, example_inputs=inputs)
    with V.set_graph_handler(graph), V.set_fake_mode(mode), V.set_debug_handler(DebugContext()):
        graph.run(*inputs)
        code, _ = graph.codegen()
    return str(code.value)
