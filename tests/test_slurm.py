"""The real batch scripts on a real Slurm of two nodes: a job resumes where it stopped, with the numbers of an uninterrupted run."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from command import run_on_forks
from slurm_cluster import NODES, Cluster, missing, running_cluster, wait_for
from task import make_task, write_recipe

WHY_NOT = missing()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(WHY_NOT is not None, reason=f"no Slurm cluster can be started: {WHY_NOT}"),
]
ROOT = Path(__file__).parents[1]
FAULTS = ROOT / "tests/faults"
SCRIPT = ROOT / "slurm/qwen3_8b_fork.sh"
STEPS = 300


class Job:
    """The batch script, submitted from the repository's root, and what became of it."""

    def __init__(self, cluster: Cluster, task: Path, *overrides: str, command: str = "sft", servers: bool = False, **settings: str) -> None:
        self.cluster = cluster
        self.name = uuid.uuid4().hex
        self.run_folder = task / "runs" / self.name
        self._output = task / f"{self.name}.log"
        settings |= {
            "RECIPE": str(task / f"{command}.yaml"),
            "MEGAFORK_COMMAND": command,
            "MEGAFORK_CPU": "1",
            "MEGAFORK_VENV": sys.prefix,
            "MEGAFORK_LOGS": str(task / "logs"),
            "MEGAFORK_TEST": self.name,
        }
        a_node = ("--ntasks-per-node=1", "--gpus-per-node=1", "--cpus-per-task=1", "--mem=1000", "--oversubscribe")
        parts = (f"--nodes={1 if servers else 2}", *a_node, *((":", "--nodes=1", *a_node) if servers else ()))
        words = ("sbatch", "--parsable", f"--output={self._output}", *parts, str(SCRIPT), f"run.name={self.name}", *overrides)
        self.id = cluster.run(*words, cwd=ROOT, **settings).strip()
        self.folder = task / "logs" / self.id

    @property
    def output(self) -> str:
        return self._output.read_text() if self._output.exists() else ""

    def field(self, name: str) -> str:
        """Of what Slurm knows about the job."""
        words = self.cluster.run("scontrol", "--oneliner", "show", "job", self.id).split()
        return next(value for key, _, value in (word.partition("=") for word in words) if key == name)

    def wait_until(self, ready: Callable[[], bool], limit_s: float = 240) -> None:
        wait_for(ready, limit_s, lambda: f"{self.field('JobState')}\n{self.output}\n{self.rank_logs()}\n{self.cluster.logs()}")

    def has_done(self, step: int) -> bool:
        file = self.run_folder / "metrics.jsonl"
        return file.exists() and f'"step": {step},' in file.read_text()

    def wait_for_step(self, step: int) -> None:
        def ready() -> bool:
            if self.has_done(step):  # looked at first: Slurm takes its time, and the run goes on meanwhile
                return True
            assert self.field("JobState") in ("PENDING", "RUNNING"), self.output + self.rank_logs()
            return False

        self.wait_until(ready)

    def end(self) -> str:
        """How the job ended, which it must do without being queued again; nothing is left of it on the nodes."""
        over = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.wait_until(lambda: self.field("JobState") in over)
        self.wait_until(lambda: not self.processes(), 20)
        return self.field("JobState")

    def start_again(self) -> None:
        """Wait for the job to be queued again, and spare it Slurm's two minutes."""
        self.wait_until(lambda: self.field("JobState") == "PENDING")
        self.wait_until(lambda: not self.processes(), 20)
        self.cluster.run("scontrol", "update", f"jobid={self.id}", "StartTime=now+2")  # a start in the same second is refused
        self.wait_until(lambda: self.field("JobState") == "RUNNING")

    def warn(self) -> None:
        """What Slurm sends before the time limit: USR1 to the batch shell."""
        self.cluster.run("scancel", "--batch", "--signal=USR1", self.id)

    def processes(self) -> list[psutil.Process]:
        return self.cluster.processes(self.name)

    def find(self, word: str, **environment: str) -> psutil.Process | None:
        """The process of the job with the word in its command line and these variables in its environment."""
        for process in self.processes():
            try:
                if word in " ".join(process.cmdline()) and environment.items() <= process.environ().items():
                    return process
            except psutil.Error:  # gone
                continue
        return None

    def wait_to_find(self, word: str, **environment: str) -> psutil.Process:
        self.wait_until(lambda: self.find(word, **environment) is not None)
        process = self.find(word, **environment)
        assert process is not None
        return process

    def rank(self, rank: int) -> psutil.Process:
        return self.wait_to_find("bin/megafork", SLURM_PROCID=str(rank))

    def rank_logs(self) -> str:
        return "".join(f"\n--- {file.name}\n{file.read_text()[-2000:]}" for file in sorted(self.folder.glob("rank_*")))


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or a scale measured."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "throughput/", "memory/", "rollout/idle_share"))} for row in rows]


def hung_up_on(folder: Path, *commands: str) -> Path:
    """A folder of Slurm's commands that end at the first call of each kind as if a busy controller had closed the connection."""
    folder.mkdir()
    for name in commands:
        script = folder / name
        hang_up = f'mkdir "{script}.called $(echo "$*" | tr / _)" 2>/dev/null && kill -PIPE $$'
        script.write_text(f'#!/bin/sh\n{hang_up}\nexec {shutil.which(name)} "$@"\n')
        script.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with running_cluster() as running:
        yield running


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With train.yaml and sft.yaml, whose one checkpoint is the last one, unless it is asked for."""
    folder = make_task(tmp_path_factory.mktemp("task"))
    reinforcement = write_recipe(folder, parallel={"tp": 2}, train={"steps": 8, "minibatches": 2, "micro_batch_tokens": 64})
    reinforcement.rename(folder / "train.yaml")
    rows = {"prompts": 8, "samples": 2, "max_response_length": 4}
    supervised = write_recipe(folder, rollout=rows, train={"steps": STEPS, "micro_batch_tokens": 64})
    supervised.rename(folder / "sft.yaml")
    return folder


def test_a_job_that_fails_is_warned_and_loses_a_node_ends_as_if_nothing_had_happened(cluster: Cluster, task: Path) -> None:
    """Each is told in the log, which reads like a run's, and the job is queued again; its numbers are those of one machine."""
    now, path = task / "now", f"{hung_up_on(task / 'bin', 'squeue', 'scontrol')}:{os.environ['PATH']}"
    job = Job(cluster, task, "checkpoint.every=20", PATH=path, PYTHONPATH=str(FAULTS), FAULT="error", FAULT_WHEN=str(now))
    job.wait_for_step(1)
    environments = [job.rank(n).environ() for n in range(2)]
    assert [one["SLURMD_NODENAME"] for one in environments] == list(NODES), "ranks follow the order of the nodes"
    assert [(one["NCCL_SOCKET_IFNAME"], one["GLOO_SOCKET_IFNAME"]) for one in environments] == [("=eth0", "eth0")] * 2
    assert "with 2 ranks on 2 nodes" in job.output
    job.wait_for_step(21)
    now.touch()
    job.wait_until(lambda: "queued again" in job.output)
    now.unlink()
    assert re.search(r"a rank failed \(srun's exit code is \d+\): rank_1\nTraceback \(most recent call last\):\n", job.output)
    assert "ArithmeticError: deliberate; queued again" in job.output
    job.start_again()
    called = {file.name for file in (task / "bin").glob("*.called *")}  # and the controller hung up
    assert f"scontrol.called requeue {job.id}" in called and sum(name.startswith("squeue.called") for name in called) == 2
    job.wait_for_step(61)
    last = warned(job)
    job.start_again()
    job.wait_for_step(last + 21)
    cluster.power_off("node2")
    job.wait_until(lambda: job.field("JobState") == "PENDING")
    cluster.power_on("node2")
    job.start_again()
    run_on_forks("sft", task / "sft.yaml", "run.name=whole", "run.ranks=2")  # while the job starts again
    assert job.end() == "COMPLETED", job.output
    assert job.field("Restarts") == "3"
    assert f"{STEPS}/{STEPS}" in job.output, "rank 0 speaks in the job's log"
    assert job.output.splitlines()[-1].endswith("slurm: done")
    runs = job.run_folder, task / "runs/whole"
    assert metrics(runs[0]) == metrics(runs[1]) and len(metrics(runs[0])) == STEPS
    weights = [(run / "hf/model.safetensors").read_bytes() for run in runs]
    assert weights[0] == weights[1]


def warned(job: Job) -> int:
    """The step after which the job has stopped and saved on request."""
    job.warn()
    job.wait_until(lambda: "stopped on request" in job.output)
    last = max(int(folder.name.removeprefix("step_")) for folder in (job.run_folder / "checkpoints").iterdir())
    assert 61 <= last < STEPS
    assert f"stopped on request after step {last}; queued again" in job.output
    assert re.search(r"asked to stop, \d+ s before the job's time is over", job.output)
    return last


@pytest.fixture(scope="module")
def hanging(cluster: Cluster, task: Path) -> Job:
    """A job whose rank 1 hangs, which takes its time to be noticed: other jobs run beside it."""
    job = Job(cluster, task, "train.steps=100000", MEGAFORK_HANG_S="90", MEGAFORK_RETRIES="0")
    job.wait_for_step(1)
    job.rank(1).suspend()
    return job


@pytest.mark.usefixtures("hanging")
def test_servers_on_nodes_of_their_own(cluster: Cluster, task: Path) -> None:
    """A job of two parts: trained on the first's node, served on the second's; servers come back, the whole job is queued again."""
    job = Job(cluster, task, "train.steps=100000", servers=True)
    job.wait_for_step(1)
    assert "rollout.servers=[http://node2:8000]" in job.output

    server = job.wait_to_find("vllm", SLURMD_NODENAME="node2")
    assert server.environ()["CUDA_VISIBLE_DEVICES"] == "1", "the hanging job has the first GPU"
    server.kill()
    server.wait()
    job.wait_to_find("vllm", SLURMD_NODENAME="node2", CUDA_VISIBLE_DEVICES="1")
    job.warn()
    job.wait_until(lambda: "queued again" in job.output)
    job.start_again()
    cluster.run("scancel", job.id)
    assert job.end() == "CANCELLED", "and not queued again"


@pytest.mark.usefixtures("hanging")
def test_reinforcement_on_two_nodes_has_the_numbers_of_one_machine(cluster: Cluster, task: Path) -> None:
    job = Job(cluster, task, command="train")
    run_on_forks("train", task / "train.yaml", "run.name=local")
    assert job.end() == "COMPLETED", job.output
    rows = metrics(job.run_folder)
    assert rows == metrics(task / "runs/local") and rows[-1]["step"] == 8


@pytest.mark.usefixtures("hanging")
def test_a_failure_before_the_first_step_ends_the_job(cluster: Cluster, task: Path) -> None:
    job = Job(cluster, task)
    job.rank(1).kill()
    assert job.end() == "FAILED"
    assert "slurm: before the first step ended, a rank failed" in job.output
    assert "not queued again" in job.output and job.field("Restarts") == "0"


@pytest.mark.usefixtures("hanging")
def test_wrong_input_ends_the_job_in_the_preflight(cluster: Cluster, task: Path) -> None:
    job = Job(cluster, task, "model.path=/nowhere")
    assert job.end() == "FAILED"
    assert job.field("ExitCode") == "2:0" and job.field("Restarts") == "0"
    said = [line for line in job.output.splitlines() if not line.startswith(("srun: ", "["))]
    wanted = [f"{node}: model.path: nothing: model.path is '/nowhere': give" for node in NODES]
    assert [line[: len(start)] for line, start in zip(sorted(said), wanted, strict=True)] == wanted
    assert "Traceback" not in job.output


def test_a_hang_is_noticed_and_tries_are_counted(hanging: Job) -> None:
    assert hanging.end() == "FAILED"
    last = r"no sign of life for 90 s, the last one: step \d+, update at [\d.]+; a rank hangs"
    assert re.search(f"{last}; this was failure 1 in a row; not queued again", hanging.output)
