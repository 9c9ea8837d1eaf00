"""What transformers says about the log-probs and entropies of completions, in fp32."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megafork.rollout.engine import Completion, Request


def check_entropies(folder: Path, requests: Sequence[Request], completions: Sequence[Completion], temperature: float) -> None:
    """Assert that both are those of the model in `folder` at this temperature, to 1e-4."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for request, completion in zip(requests, completions, strict=True):
        with torch.no_grad():
            ids = torch.tensor([[*request.prompt, *completion.tokens]])
            logits = model(ids).logits[0, len(request.prompt) - 1 : -1].double() / temperature
        log_prob = logits.log_softmax(-1)
        entropy = -(log_prob.exp() * log_prob).sum(-1)
        drawn = log_prob.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.entropies).double(), entropy, atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.tensor(completion.log_probs).double(), drawn, atol=1e-4, rtol=0)
