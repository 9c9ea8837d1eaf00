"""A kernel for block-wise FP8 weights on CPUs without AMX, for which vLLM 0.32 has none and refuses the model.

It is slow and computes what the GPU kernels compute, so that FP8 folders and FP8 refits can be tested without a GPU. It can go when
vLLM's own kernels support any CPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def install() -> None:
    """Add the kernel after vLLM's own, so that it is used only if none of those fits the CPU. Call before creating a model. Idempotent."""
    from vllm.model_executor.kernels import linear
    from vllm.platforms import PlatformEnum

    kernels: list[Any] = linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU]
    if not any(kernel.__name__ == "ReferenceBlockKernel" for kernel in kernels):
        kernels.append(_kernel(linear.Fp8BlockScaledMMLinearKernel))


def _kernel(base: Any) -> type:
    class ReferenceBlockKernel(base):
        """Quantises activations by 1 x 128, as the base class does, and multiplies in fp32."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, A: Tensor, B: Tensor, As: Tensor, Bs: Tensor) -> Tensor:
            """A [tokens, K] e4m3 with As [tokens, K / 128]; B [N, K] e4m3 with Bs [N / 128, K / 128]; returns [tokens, N] fp32."""
            rows, columns = self.weight_group_shape
            inputs = A.float() * As.repeat_interleave(columns, 1)[:, : A.size(1)]
            weight = B.float() * Bs.repeat_interleave(rows, 0)[: B.size(0)].repeat_interleave(columns, 1)[:, : B.size(1)]
            return inputs @ weight.T

    return ReferenceBlockKernel
