"""CUDA played on the CPU: finds code that a GPU would refuse, or that would make the host wait for it, on a machine without one.

`rehearse()` turns a forked rank into one that has a GPU: tensors made on cuda:0 say so, hold CPU memory and are computed by the CPU's
kernels, so that numbers equal the plain path's. What CUDA refuses raises `Refused`; each wait of the host for the device and each copy
between them is written into a `Ledger` with file and line.

Not seen: the order of streams, and with it a host that reads an asynchronous copy too early; memory (the allocator, sizes); what only
NCCL, Triton's or cuDNN's kernels refuse or wait for, and which attention kernel is taken; the optimizer's multi-tensor kernels; random
states of the GPU; a gradient on another device than its tensor, where autograd itself would compare them; and vLLM.
"""

from rehearsal.ledger import Event, Ledger, Refused
from rehearsal.machine import DEVICE, rehearse

__all__ = ["DEVICE", "Event", "Ledger", "Refused", "rehearse"]
