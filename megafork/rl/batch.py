"""A step's data: responses on the host, and the micro-batches they are packed into."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from megafork.parallel.to_device import to_device


@dataclass
class Response:
    """One sampled response. Identified within its step by (group, sample), whichever rank holds it."""

    group: int
    """Number of the prompt among the prompts sampled in this step."""
    sample: int
    """0 <= sample < G."""
    prompt: int
    """Index of the prompt in its dataset."""
    prompt_tokens: Tensor
    """int32 [p]."""
    tokens: Tensor
    """int32 [n], n >= 1, end-of-sequence included."""
    log_probs: Tensor
    """fp32 [n], the roll-out engine's log-probs at the temperature that drew each token."""
    truncated: bool
    """The response reached max_response_length without ending."""
    text: str = ""
    """Decoded response; only on the rank that sampled it."""
    accuracy: float = 0.0
    """The verifier's verdict in [0, 1]."""
    reward: float = 0.0
    advantage: float = 0.0
    versions: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    """int32 [n], the step whose weights sampled each token; empty if the response was not sampled in this run."""
    entropies: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [n], nats, the roll-out engine's at the temperature that drew the tokens; empty unless `forks.entropy_from` is `rollout`."""

    routing: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int16))
    """int16 [p + n - 1, layers, k], the experts that the roll-out engine chose for each token that it was fed, under `rollout.routing:
    replay`; else empty."""
    cut: int = 0
    """Tokens removed from its end before training (`forks.select: prefix`)."""

    @property
    def whole_length(self) -> int:
        """Response tokens as sampled, including those cut off."""
        return len(self.tokens) + self.cut

    @property
    def length(self) -> int:
        """Tokens that the model is fed: the last response token is predicted, never fed."""
        return len(self.prompt_tokens) + len(self.tokens) - 1


def sum_and_mean_by_response(values: Tensor, response: Tensor, responses: int, context: dist.ProcessGroup | None) -> tuple[Tensor, Tensor]:
    """Sum and mean of `values` [N] over the tokens of each response, without gradient: fp64 [R] each, R at least 1.

    response: int64 [N], the response of each token. Every rank of `context` (CP), which hold parts of the same `responses`, must call.
    """
    sums = torch.zeros(2, max(responses, 1), dtype=torch.float64, device=values.device)
    sums[0].index_add_(0, response, values.detach().double())
    sums[1].index_add_(0, response, torch.ones_like(values, dtype=torch.float64))
    if context is not None:
        dist.all_reduce(sums, group=context)
    return sums[0], sums[0] / sums[1].clamp(min=1.0)


@dataclass
class MicroBatch:
    """Responses packed back to back, as one CP rank sees them.

    P counts the positions of this CP rank that predict a response token. Vectors of length P follow the order of the responses and of
    their tokens. `old_log_prob`, `entropy` (after scoring), `fork` and `mask` (after selection) exist on the last pipeline stage.
    """

    responses: list[Response]
    tokens: Tensor
    """int64 [1, T / cp], padding included."""
    lengths: tuple[int, ...]
    """Padded tokens of each sequence over all CP ranks; their sum is T."""
    places: Tensor
    """int64 [T / cp], position of each token within its sequence."""
    order: Tensor | None
    """int64 [T], position of each token once the CP ranks' tokens are gathered (`context.unzigzag_index`); None without CP."""
    owner: Tensor
    """int64 [T / cp], index into `responses` of the one that each token belongs to, -1 for padding."""
    positions: Tensor
    """int64 [P], index into this rank's tokens."""
    positions_on_host: Tensor
    """The same in host memory."""
    targets: Tensor
    """int64 [P], the token to predict."""
    sequence: Tensor
    """int64 [P], index into `responses`."""
    offset: Tensor
    """int64 [P], index of the target within its response."""
    rollout_log_prob: Tensor
    """fp32 [P]."""
    advantage: Tensor
    """fp32 [P]."""
    temperature: Tensor
    """fp32 [P], at which each token was drawn and its log-prob is taken. Under `rollout.fork_temperature` it is 1 until scoring."""
    entropy_temperature: float
    """Temperature at which entropies are taken: the roll-out's, or 1 under `rollout.fork_temperature`."""
    rollout_entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [P], nats; empty unless the engine returned entropies."""
    old_log_prob: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [P], log-prob under the policy that starts the step, or the roll-out's (`loss.old_log_prob`)."""
    entropy: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [P], nats, at `entropy_temperature`: those that select the forks (`forks.entropy_from`)."""
    fork: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [P], the tokens that the rule selects (after selection)."""
    mask: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))
    """bool [P], the tokens with a loss: the forks, or all under `forks.rest_weight`."""
    emphasis: Tensor | None = None
    """fp32 [P], weight of each token in the mask relative to the others. None: 1."""
    response_correction: Tensor | None = None
    """fp32 [P], factor of each token's loss from the ratios of its whole response (`mismatch.py`, after scoring). None: 1."""
    reference_log_prob: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [P], log-prob under the model that the run starts from, if `loss.kl` needs it."""
    old_kl: Tensor | None = None
    """fp32 [P], factor of KL(p_old, p) in each token's loss (`covariance.py`). None: 0."""
    weight: Tensor = field(default_factory=lambda: torch.empty(0))
    """fp32 [P], weight of each position's loss; 0 outside the mask."""
    balance: float = 0.0
    """Weight of each response's part of the loss that balances experts."""
    routing: Tensor | None = None
    """int16 [T / cp, layers, k], the experts that each token takes, -1 for padding (`rollout.routing`). Those noted by the scoring pass are
    only this rank's, and -1 elsewhere. None: routers choose."""

    _selected: tuple[Tensor, int, Tensor, Tensor] | None = field(default=None, init=False, repr=False)

    @property
    def selected(self) -> Tensor:
        """int64 [P'], the mask as indices into vectors of length P. Only the first call for a mask waits for the device; indexing by
        the mask itself would wait every time."""
        return self._find_selected()[0]

    @property
    def selected_on_host(self) -> Tensor:
        """`selected` in host memory."""
        return self._find_selected()[1]

    def _find_selected(self) -> tuple[Tensor, Tensor]:
        if self._selected is None or self._selected[0] is not self.mask or self._selected[1] != self.mask._version:
            on_host = self.mask.cpu().nonzero()[:, 0]
            self._selected = self.mask, self.mask._version, to_device(on_host, self.mask.device), on_host
        return self._selected[2:]

    def by_response(self, values: Tensor, context: dist.ProcessGroup | None = None) -> list[Tensor]:
        """Values of this rank's positions [P] as one fp32 vector per response, over the tokens of the response.

        With context parallelism all ranks of the `context` group must call.
        """
        ends = torch.tensor([0, *(len(response.tokens) for response in self.responses)]).cumsum(0)
        flat = torch.zeros(int(ends[-1]), dtype=torch.float32, device=values.device)
        flat[to_device(ends, values.device)[self.sequence] + self.offset] = values.float()
        if context is not None and context.size() > 1:
            dist.all_reduce(flat, group=context)
        flat = flat.cpu()
        return [flat[start:end] for start, end in itertools.pairwise(ends.tolist())]

    @property
    def padding(self) -> int:
        """Tokens over all CP ranks that belong to no sequence."""
        return sum(self.lengths) - sum(response.length for response in self.responses)
