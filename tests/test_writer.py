"""Files written while the run goes on: in order, within bounds, and never a silent failure."""

from __future__ import annotations

import errno
import threading
from functools import partial

import pytest

from megafork.train.stopped import Stopped
from megafork.train.writer import WAITING, Writer


def test_work_is_done_in_order_and_no_more_than_some_waits() -> None:
    writer, done, go = Writer(), list[int](), threading.Semaphore(0)

    def work(number: int) -> None:
        go.acquire()
        done.append(number)

    for number in range(WAITING):
        writer.begin("a file", partial(work, number))
    assert done == [], "nothing is waited for"
    third = threading.Thread(target=writer.begin, args=("a file", partial(work, WAITING)))
    third.start()
    third.join(0.2)
    assert third.is_alive(), "it waits until there is room"
    go.release()
    third.join(60)
    assert not third.is_alive() and done == [0]
    for _ in range(WAITING):
        go.release()
    writer.settle()
    assert done == list(range(WAITING + 1))


def fail(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("settles", [True, False])
def test_a_failure_is_raised_once_by_the_next_call(settles: bool) -> None:
    writer, done = Writer(), list[str]()
    writer.begin("rollouts: step 3", partial(fail, PermissionError(errno.EACCES, "Permission denied", "rollouts")))
    later = writer._background.begin(lambda: None)  # behind it
    later.result(60)
    with pytest.raises(Stopped, match=r"^rollouts: step 3 can't be written \(\[Errno 13\] Permission denied: 'rollouts'\): mend it, and"):
        writer.settle() if settles else writer.begin("rollouts: step 4", lambda: done.append("written"))
    writer.settle()
    writer.begin("rollouts: step 4", lambda: done.append("written"))
    writer.settle()
    assert done == ["written"]


def test_a_full_disk_and_a_fault_of_ours_are_raised_as_they_are() -> None:
    for error in (OSError(errno.ENOSPC, "No space left on device"), ZeroDivisionError()):
        writer = Writer()
        writer.begin("a file", partial(fail, error))
        with pytest.raises(type(error)) as caught:
            writer.settle()
        assert caught.value is error
