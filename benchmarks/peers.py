"""The peers' own code, unmodified, from the package registry: installed into `.venv-peers`, loaded next to megafork.

A module with few dependencies is loaded directly from its file, because importing its package would pull in a whole training stack.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from torch import Tensor

from megafork.compat import cpu

cpu.install()
from megatron.core import tensor_parallel  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
PINS = Path(__file__).with_name("peers.txt")
FOLDER = ROOT / ".venv-peers"

Head = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(hidden [N, H], this rank's weight [V/TP, H], targets [N]) -> (log_prob [N], entropy [N]), both with gradient."""


def install() -> None:
    """Install the peers unless exactly this list is already installed."""
    installed = FOLDER / "installed.txt"
    if installed.exists() and installed.read_text() == PINS.read_text():
        return
    pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--no-compile", "--upgrade", "--target", str(FOLDER)]
    subprocess.run([*pip, "--requirement", str(PINS)], check=True)
    installed.write_text(PINS.read_text())


def versions() -> dict[str, str]:
    return dict(line.split("==") for line in PINS.read_text().splitlines() if "==" in line)


def verl_head() -> Head:
    """The unfused path of verl's Megatron engine: logits, a copy of them, the entropy of one and the log-prob of the other."""
    verl = _module("verl/utils/megatron/tensor_parallel.py")

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = _logits(hidden, weight)
        copy = logits.clone()  # as the engine does: Megatron's cross-entropy modifies its input in place
        entropy = verl.vocab_parallel_entropy(logits)
        return verl.vocab_parallel_log_probs_from_logits(copy, targets), entropy

    return head


def swift_head() -> Head:
    """Megatron-SWIFT's log-prob and entropy."""
    swift = _module("swift/megatron/trainers/vocab_parallel_utils.py")
    warnings.filterwarnings("ignore", message="c10d::allreduce_")  # it calls a plain all-reduce inside autograd

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = _logits(hidden, weight)[None]
        log_prob, entropy = swift.compute_logps_and_entropy_from_logits(logits, targets[None], compute_entropy=True)
        return log_prob[0], entropy[0]

    return head


def megatron_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Megatron's own cross-entropy: a log-prob and no entropy (zeros), a lower bound for a peer's cost."""
    log_prob = -tensor_parallel.vocab_parallel_cross_entropy(_logits(hidden, weight), targets)
    return log_prob, torch.zeros_like(log_prob)


def slime_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """slime's algorithm reimplemented, as there is no package: entropy as a metric, in chunks without gradient, then the log-prob."""
    logits = _logits(hidden, weight)
    with torch.no_grad():
        entropy = torch.cat([_entropy(part) for part in logits.split(1024)])
    return -tensor_parallel.vocab_parallel_cross_entropy(logits, targets), entropy


def trl_mask() -> Callable[[Tensor, float], Tensor]:
    """TRL's `GRPOTrainer.get_high_entropy_mask`: (entropies [B, S], quantile) -> mask [B, S].

    The import takes seconds: call it before a fork.
    """
    sys.path.append(str(FOLDER))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the version of vLLM, which is not used here
        accelerate = importlib.import_module("accelerate")
        trl = importlib.import_module("trl.trainer.grpo_trainer")

    def mask(entropies: Tensor, quantile: float) -> Tensor:
        trainer = SimpleNamespace(accelerator=accelerate.Accelerator(cpu=not torch.cuda.is_available()))
        return trl.GRPOTrainer.get_high_entropy_mask(trainer, entropies, torch.ones_like(entropies), quantile)

    return mask


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """Megatron's column-parallel head: the gradient of `hidden` is summed over the ranks."""
    return tensor_parallel.copy_to_tensor_model_parallel_region(hidden) @ weight.t()


def _entropy(logits: Tensor) -> Tensor:
    """Entropy of a chunk of logits [n, V/TP], reduced over the ranks."""
    top = logits.amax(1, keepdim=True)
    torch.distributed.all_reduce(top, torch.distributed.ReduceOp.MAX)
    exp = (logits - top).exp()
    total, weighted = exp.sum(1), (exp * logits).sum(1)
    torch.distributed.all_reduce(total)
    torch.distributed.all_reduce(weighted)
    return top[:, 0] + total.log() - weighted / total


def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"peer_{Path(path).stem}", FOLDER / path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
