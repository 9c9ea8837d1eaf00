"""Score responses in verifier processes that may raise, hang, crash or attack without harming anything else."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

from megafork import recipe
from megafork.data.verdicts import sandbox, seccomp
from megafork.data.verdicts.verifier_process import Item, Verdict, VerifierProcess
from megafork.data.verifiers import BUILT_IN
from megafork.recipe import Key, RecipeError
from megafork.user_code import name_problem

__all__ = ["Item", "Verdict", "Verifiers", "as_judged", "check_row", "check_verifier", "needs"]


def check_verifier(reward: recipe.Reward) -> None:
    """Raise RecipeError for an unknown verifier, a missing file, and an isolation unavailable here. Loads no verifier."""
    name = reward.verifier
    if problem := name_problem(name, BUILT_IN):
        raise RecipeError(Key("reward.verifier"), f" is {name!r}: {problem}")
    if name == "code" and not seccomp.supported():
        raise RecipeError(Key("reward.verifier"), " is 'code': programs are judged only on Linux for x86-64 and AArch64")
    if reward.isolation == "full" and sandbox.available() is None:
        raise RecipeError(
            Key("reward.isolation"),
            " is 'full': this machine has no user namespaces for it; install bubblewrap, allow them (docs/verifiers.md), "
            "or leave reward.isolation out",
        )


def needs(reward: recipe.Reward) -> tuple[str, ...]:
    """Fields that a row must have for this verifier (for `load_prompts`): () for a user's verifier, which may read any field, and for
    `code`, whose tests have many forms: see `check_row`."""
    return {"exact": ("answer",), "math": ("answer",), "reasoning_gym": ("answer", "metadata")}.get(reward.verifier, ())


def check_row(reward: recipe.Reward) -> Callable[[dict[str, Any]], None]:
    """A check of one row for this verifier (for `load_prompts`): raises ValueError, whose text continues `FILE line N ...`."""
    if reward.verifier != "code":
        return lambda row: None
    from megafork.data.verdicts.code_tests import tests_of

    def has_tests(row: dict[str, Any]) -> None:
        tests_of(row)

    return has_tests


def as_judged(response: str, prompt: str, verifier: str) -> str:
    """The response as the verifier of this name sees it: to a built-in one, a thought that the prompt's template opened is still open."""
    return "<think>" + response if verifier in BUILT_IN and prompt.rstrip().endswith("<think>") else response


class Verifiers:
    """`reward.workers` verifier processes, as a context manager. `score` is not thread-safe.

    They die with this process, even if it is killed by SIGKILL. Raises RecipeError if the verifier cannot be loaded.
    """

    def __init__(self, reward: recipe.Reward) -> None:
        check_verifier(reward)
        tool = None if reward.isolation == "process" else sandbox.available()
        if tool is not None:
            sandbox.compile_packages(reward.verifier)
        self._workers = [VerifierProcess(reward, tool) for _ in range(reward.workers)]
        self._idle: SimpleQueue[VerifierProcess] = SimpleQueue()
        # each thread only waits for one process; the threads must outlive the processes they start, which die with their thread
        self._threads = ThreadPoolExecutor(reward.workers, thread_name_prefix="verifier")
        try:
            for worker in self._workers:
                worker.await_ready()
                self._idle.put(worker)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def score(self, items: list[Item]) -> list[Verdict]:
        """Verdicts on (response text, row) items, in their order. Whatever happens on one item never affects another."""
        return list(self._threads.map(self._judge, items))

    def begin(self, item: Item) -> Future[Verdict]:
        """The verdict on one item, as soon as a process has time for it."""
        return self._threads.submit(self._judge, item)

    def close(self) -> None:
        """End the processes, after waiting at most `reward.timeout_s` for pending verdicts."""
        self._threads.shutdown(cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _judge(self, item: Item) -> Verdict:
        worker = self._idle.get()
        try:
            return worker.judge(item)
        finally:
            self._idle.put(worker)
