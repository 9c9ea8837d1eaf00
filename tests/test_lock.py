"""One writer at a time: a second is refused in a line that names the first, and may start as soon as that ends, however it ends."""

from __future__ import annotations

import multiprocessing
import os
import time
from pathlib import Path

import pytest
from held import another

from megafork.lock import LOCK, sole_writer
from megafork.recipe import RecipeError


def test_a_second_writer_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    with another(tmp_path / "run") as holder:
        with pytest.raises(RecipeError) as error, sole_writer(tmp_path / "run", "run.name is 'a'"):
            pass
        said = str(error.value)
        assert said.startswith(f"run.name is 'a': another process is writing there (process {holder.pid} on ") and "\n" not in said
        with sole_writer(tmp_path / "other", "run.name is 'b'"):
            pass
        holder.kill()
        holder.join()
        with sole_writer(tmp_path / "run", "run.name is 'a'"):
            assert f"process {os.getpid()} on" in (tmp_path / "run" / LOCK).read_text()
        with sole_writer(tmp_path / "run", "run.name is 'a'"):  # and after an end of the block
            pass


def test_a_child_does_not_keep_the_lock_of_its_parent(tmp_path: Path) -> None:
    """As a verifier or a writer of checkpoints that outlives its rank for a moment."""
    with sole_writer(tmp_path, "--out is 'x'"):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        child.start()
    with another(tmp_path):
        assert child.is_alive()
    child.kill()
    child.join()


def test_a_writer_may_be_waited_for(tmp_path: Path) -> None:
    with another(tmp_path, for_s=1.0), sole_writer(tmp_path, "--out is 'x'", patience_s=60.0):
        pass


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", Path("/proc/run"), tmp_path / ("x" * 300)):
        with pytest.raises(RecipeError, match=r"can't be written .*: choose another folder$"), sole_writer(folder, "run.folder is 'x'"):
            pass
