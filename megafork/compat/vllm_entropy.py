"""vLLM returns each token's entropy beside its log-prob (0.26 to 0.32, both model runners, with and without speculative decoding).

vLLM itself has no such output. A request with `logprobs=ASKED` gets, instead of the most likely tokens, the entropy of the distribution
that its token was drawn from, under the token id `MARK`. It travels with the log-prob of the token, in the same row of the same tensor, so
it belongs to that token whatever the scheduler does: preemption, chunked prompts, cached prefixes, several tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ASKED = 2
"""`SamplingParams.logprobs` of a request for entropies: vLLM's server answers with the first two of them, the token's own included."""
MARK = -1
"""The token id under which an entropy is returned; no token has it."""


def install() -> None:
    """Patch both model runners of this process. Call in every process with an engine, before it is made. Other requests are answered as
    before."""
    from vllm.v1.sample.sampler import Sampler

    if not getattr(Sampler.gather_logprobs, "gathers_entropies", False):
        Sampler.gather_logprobs = staticmethod(_gathering(Sampler.gather_logprobs, normalised=True))
    try:
        from vllm.v1.worker.gpu.sample import sampler
        from vllm.v1.worker.gpu.spec_decode import rejection_sampler
    except ModuleNotFoundError:
        return  # an older vLLM, or one without what its second runner needs
    for module in (sampler, rejection_sampler):
        if hasattr(module, "compute_topk_scores") and not getattr(module.compute_topk_scores, "gathers_entropies", False):
            module.compute_topk_scores = _gathering(module.compute_topk_scores, normalised=False)


def _gathering(original: Callable[..., Any], *, normalised: bool) -> Callable[..., Any]:
    """For V1's `Sampler.gather_logprobs`, given log-probs (`normalised`), and V2's `compute_topk_scores`, given logits."""

    def gather(scores: Tensor, count: int, *args: Any, **kwargs: Any) -> Any:
        if count != ASKED or kwargs.get("logits_mode") or kwargs.get("max_per_req_token_ids"):
            return original(scores, count, *args, **kwargs)
        answer = original(scores, 0, *args, **kwargs)
        entropies = entropy_of(scores, normalised=normalised)[:, None].expand(-1, count)
        return answer._replace(
            logprobs=torch.cat([answer.logprobs, entropies], dim=1),
            logprob_token_ids=torch.nn.functional.pad(answer.logprob_token_ids, (0, count), value=MARK),
        )

    gather.gathers_entropies = True  # type: ignore[attr-defined]
    return gather


def entropy_of(scores: Tensor, *, normalised: bool, at_once: int = 1 << 24) -> Tensor:
    """Entropy in nats of each row's distribution: logits, or log-probs if `normalised`, [N, V] -> fp32 [N]. A score of -inf has
    probability 0 and adds 0.

    About `at_once` scores are processed at a time, so that a large batch needs 64 MiB and not gigabytes.
    """
    parts = scores.split(max(1, at_once // scores.shape[1]))
    probabilities = (part.exp() if normalised else part.softmax(-1, dtype=torch.float32) for part in parts)
    return torch.cat([torch.special.entr(part).sum(-1) for part in probabilities])
