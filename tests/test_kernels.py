"""The Triton kernels and their PyTorch reference against float64: on a GPU if there is one, otherwise in Triton's interpreter."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from megafork.parallel import blocks
from megafork.parallel.blocks import LOWEST, GradientTerms

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def triton_process() -> Iterator[Run]:
    """Calls a function where `kernels` can run: here on a GPU, else in a process that imports triton as an interpreter."""
    if DEVICE == "cuda":
        yield lambda function, *args: function(*args)
        return
    with pytest.MonkeyPatch.context() as patch, ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        patch.setenv("TRITON_INTERPRET", "1")
        pool.submit(torch.set_num_threads, 1).result()  # starts the process with that environment
        yield lambda function, *args: pool.submit(function, *args).result()


@pytest.fixture(params=["triton", "pytorch"])
def implementation(request: pytest.FixtureRequest) -> tuple[str, Run]:
    if request.param == "pytorch":
        return "pytorch", lambda function, *args: function(*args)
    return "triton", request.getfixturevalue("triton_process")


def module(name: str) -> Any:
    if name == "pytorch":
        return blocks
    from megafork.parallel import kernels  # only where triton interprets, or has a GPU

    return kernels


def stats_of(name: str, logits: Tensor, targets: Tensor, temperatures: Tensor, widths: list[int]) -> Tensor:
    """The stats [4, n] of whole rows that come as blocks of these widths."""
    stats = torch.zeros(4, len(logits), device=DEVICE)
    stats[0] = LOWEST
    start = 0
    for width in widths:
        block = logits[:, start : start + width].to(DEVICE, copy=True).contiguous()
        module(name).accumulate_stats(stats, block, targets.to(DEVICE) - start, temperatures.to(DEVICE))
        start += width
    assert start == logits.shape[1]
    return stats.cpu()


def gradient_of(name: str, logits: Tensor, targets: Tensor, terms: GradientTerms, dtype: torch.dtype) -> Tensor:
    on_device = GradientTerms(*(None if vector is None else vector.to(DEVICE) for vector in terms))  # type: ignore[arg-type]
    return module(name).logits_gradient(logits.clone().to(DEVICE), targets.to(DEVICE), on_device, dtype).cpu()


def random_logits(n: int, columns: int, scale: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n * columns)
    return torch.randn(n, columns, generator=g) * scale, torch.randint(columns, (n,), generator=g), 0.3 + torch.rand(n, generator=g)


def assert_stats_equal_float64(stats: Tensor, logits: Tensor, targets: Tensor, temperatures: Tensor) -> None:
    x = logits.double()
    top = x.amax(1)
    z = ((x - top[:, None]) / temperatures[:, None]).clamp(min=-1e300)
    assert torch.equal(stats[0].double(), top)
    torch.testing.assert_close(stats[1].double(), z.exp().sum(1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stats[2].double(), (z * z.exp()).sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats[3].double(), x.gather(1, targets[:, None])[:, 0])


@pytest.mark.parametrize("widths", [[1], [7], [16], [4096], [4097], [5000, 4096, 905], [300, 1, 1, 18_690]])
def test_stats_equal_float64(implementation: tuple[str, Run], widths: list[int]) -> None:
    name, run = implementation
    logits, targets, temperatures = random_logits(5, sum(widths))
    assert_stats_equal_float64(run(stats_of, name, logits, targets, temperatures, widths), logits, targets, temperatures)


def test_stats_of_bf16_logits(implementation: tuple[str, Run]) -> None:
    name, run = implementation
    logits, targets, temperatures = random_logits(4, 4100)
    if name == "triton":
        logits = logits.bfloat16()
    assert_stats_equal_float64(run(stats_of, name, logits, targets, temperatures, [4096, 4]), logits, targets, temperatures)


def extreme_logits() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.zeros(6, 40)
    logits[0] = 1e4
    logits[1] = -1e4
    logits[2, :39] = -torch.inf
    logits[3, ::2] = -torch.inf
    logits[4, 0], logits[4, 1:] = 1e4, -1e4
    logits[5] = torch.arange(40.0) * 300
    return logits, torch.tensor([3, 0, 39, 1, 0, 39]), torch.tensor([1.0, 0.1, 1.0, 2.0, 1.0, 0.5])


@pytest.mark.parametrize("widths", [[40], [1] * 40, [2, 37, 1]])
def test_stats_of_huge_equal_and_infinite_logits(implementation: tuple[str, Run], widths: list[int]) -> None:
    name, run = implementation
    assert_stats_equal_float64(run(stats_of, name, *extreme_logits(), widths), *extreme_logits())


def terms_of(logits: Tensor, temperatures: Tensor, with_entropy: bool) -> tuple[GradientTerms, Tensor, Tensor]:
    """Terms as the head makes them, and the gradients of log-prob and entropy (zero without)."""
    z = (logits.double() - logits.double().amax(1, keepdim=True)) / temperatures[:, None]
    log_total = z.exp().sum(1).log()
    log_p = (z - log_total[:, None]).clamp(min=-1e300)
    entropy = -(log_p.exp() * log_p).sum(1)
    g = torch.Generator().manual_seed(3)
    grad_log_prob, grad_entropy = torch.randn(2, len(logits), generator=g)
    terms = GradientTerms.of(
        temperatures, logits.float().amax(1), log_total.float(), entropy.float(), grad_log_prob, grad_entropy if with_entropy else None
    )
    return terms, grad_log_prob, grad_entropy * with_entropy


def gradient_in_float64(logits: Tensor, targets: Tensor, temperatures: Tensor, grad_log_prob: Tensor, grad_entropy: Tensor) -> Tensor:
    x = logits.double().clamp(min=-1e6).requires_grad_()
    log_p = (x / temperatures[:, None]).log_softmax(1)
    inside = (targets >= 0) & (targets < logits.shape[1])
    log_prob = log_p.gather(1, targets.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    # a target in another block still takes probability from this one's columns
    outside = -(x / temperatures[:, None]).logsumexp(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    (torch.where(inside, log_prob, outside) @ grad_log_prob.double() + entropy @ grad_entropy.double()).backward()
    assert x.grad is not None
    return x.grad


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 16, 4096, 4097, 9001])
def test_gradient_equals_float64(implementation: tuple[str, Run], columns: int, with_entropy: bool) -> None:
    name, run = implementation
    logits, targets, temperatures = random_logits(5, columns)
    targets[0], targets[1] = -1, columns  # owned by a neighbouring block
    terms, *grads = terms_of(logits, temperatures, with_entropy)
    expected = gradient_in_float64(logits, targets, temperatures, *grads)
    found = run(gradient_of, name, logits, targets, terms, torch.float32)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    half = run(gradient_of, name, logits, targets, terms, torch.bfloat16)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), expected, rtol=2**-7, atol=1e-5)  # the interpreter truncates


@pytest.mark.parametrize("with_entropy", [False, True])
def test_gradient_of_huge_equal_and_infinite_logits(implementation: tuple[str, Run], with_entropy: bool) -> None:
    name, run = implementation
    logits, targets, temperatures = extreme_logits()
    targets[3] = 0
    terms, *grads = terms_of(logits, temperatures, with_entropy)
    found = run(gradient_of, name, logits, targets, terms, torch.float32)
    torch.testing.assert_close(found.double(), gradient_in_float64(logits, targets, temperatures, *grads), rtol=1e-5, atol=1e-5)
    never = logits.isinf() & (torch.arange(40) != targets[:, None])
    assert (found[never] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_logit_that_is_no_number_is_not_hidden(implementation: tuple[str, Run], bad: float) -> None:
    name, run = implementation
    logits, targets, temperatures = random_logits(2, 50)
    logits[1, 20] = bad
    stats = run(stats_of, name, logits, targets, temperatures, [30, 20])
    assert stats[1].isnan().tolist() == stats[2].isnan().tolist() == [False, True]
