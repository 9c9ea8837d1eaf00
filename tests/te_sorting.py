"""Compares Transformer Engine's Triton kernels that sort tokens by expert, interpreted on the CPU, with what `te_kernels` plays in their
place, and with what the plan counts. Run by `test_fused_experts.py` with TRITON_INTERPRET=1, which Triton reads when it is imported.

The sums are compared within two roundings: the interpreter cuts bf16 off where a GPU rounds it.
"""

from __future__ import annotations

import torch
import transformer_engine.pytorch.triton.permutation as kernels

import megafork.model.build  # noqa: F401  (Megatron without a GPU)

from megatron.core.transformer.moe import moe_utils  # isort: skip

TOKENS, EXPERTS, CHOSEN, HIDDEN = 37, 8, 3, 64


def main() -> None:
    for kernel in vars(kernels).values():
        if hasattr(kernel, "configs"):
            kernel.configs = kernel.configs[:1]  # nothing to choose by time here
    torch.manual_seed(0)
    tokens = torch.randn(TOKENS, HIDDEN).bfloat16()
    chosen = torch.zeros(TOKENS, EXPERTS, dtype=torch.bool).scatter(1, torch.rand(TOKENS, EXPERTS).topk(CHOSEN).indices, True)
    weights = torch.rand(TOKENS, EXPERTS) * chosen
    places = kernels.make_row_id_map(chosen, TOKENS, EXPERTS)
    assert places.dtype == torch.int32 and places.shape == (TOKENS, 2 * EXPERTS + 1)

    copies = TOKENS * CHOSEN
    got, _, got_weights = kernels.permute_with_mask_map(tokens, places, weights, None, TOKENS, EXPERTS, copies, HIDDEN, None)
    wanted, wanted_weights, order = moe_utils.permute(tokens, chosen, weights, copies)
    assert torch.equal(got, wanted) and torch.equal(got_weights, wanted_weights)

    made = torch.randn(copies, HIDDEN).bfloat16()
    added, gradients = kernels.unpermute_with_mask_map(made, places, None, got_weights, TOKENS, EXPERTS, HIDDEN)
    sums = torch.zeros(TOKENS, HIDDEN, dtype=torch.float64).index_add_(0, order, made.double())
    assert ((added.double() - sums).abs() <= 2**-7 * sums.abs()).all(), "they are added in fp32 and rounded once"
    assert torch.equal(gradients, weights)

    sizes, to = torch.tensor([5, 0, 9, 3, 7, 2]), torch.tensor([0, 2, 4, 1, 3, 5])
    rows, row_weights = torch.randn(26, HIDDEN).bfloat16(), torch.rand(26)
    chunks = kernels.make_chunk_sort_map(sizes, to, 26, len(sizes))
    assert chunks.dtype == torch.int32 and chunks.shape == (26,)
    for one, other in zip(
        kernels.sort_chunks_by_map(rows, chunks, row_weights, 26, HIDDEN, is_forward=True),
        moe_utils.sort_chunks_by_idxs(rows, sizes, to, row_weights),
        strict=True,
    ):
        assert torch.equal(one, other)


if __name__ == "__main__":
    main()
