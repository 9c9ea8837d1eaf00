"""Simulates CUDA on the CPU: on a machine without a GPU, finds code that a GPU would refuse, or that would make the host wait for it.

`rehearse()` makes a forked rank believe that it has a GPU: tensors created on cuda:0 report that device, but hold CPU memory and are
computed by CPU kernels, so that numbers equal the plain path's. Operations that CUDA refuses raise `Refused`; each wait of the host for the
device and each copy between them is recorded in a `Ledger` with file and line.

Not simulated: the order of streams, and so a host that reads an asynchronous copy too early; memory (the allocator, sizes); anything that
only NCCL, Triton's, cuDNN's or Transformer Engine's kernels refuse or wait for, and so fused layers themselves; the choice of attention
kernel, and what torch.compile makes of SwiGLU; the optimizer's multi-tensor kernels; the GPU's random states; a gradient on a different
device from its tensor, where autograd itself would compare them; and vLLM.
"""

from rehearsal.ledger import Event, Ledger, Refused
from rehearsal.machine import DEVICE, rehearse

__all__ = ["DEVICE", "Event", "Ledger", "Refused", "rehearse"]
