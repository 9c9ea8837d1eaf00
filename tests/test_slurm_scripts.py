"""The batch scripts, with stand-ins for Slurm's commands: what they call, and when they consider a run to be hanging or ask it to stop.

`test_slurm.py` uses a real Slurm.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import recipe, save_model

from megafork.plan.deadlines import HANG_S, WARNING_S, Deadlines
from megafork.plan.hardware import GPUS
from megafork.plan.speed import Step
from slurm import preflight

ROOT = Path(__file__).parents[1]
RUNS = ("qwen3_8b_fork.sh", "qwen3_14b_fork.sh", "qwen3_32b_fork.sh", "qwen3_30b_a3b_fork.sh", "qwen3_235b_a22b_fork.sh")
JOB = {
    "SLURM_JOB_ID": "7",
    "SLURM_JOB_NUM_NODES": "2",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "16",
    "SLURM_CPUS_PER_TASK": "12",
}
TWO_PARTS = {
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
    "SLURM_NTASKS_HET_GROUP_0": "8",
    "SLURM_CPUS_PER_TASK_HET_GROUP_0": "11",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "node1",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "node2",
    "SLURM_NTASKS_PER_NODE_HET_GROUP_1": "2",
    "SLURM_CPUS_PER_TASK_HET_GROUP_1": "48",
}
STAND_INS = {
    "srun": """#!{python}
import json, os, subprocess, sys
names = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps({{"words": sys.argv[1:], **{{name: os.environ.get(name) for name in names}}}}) + "\\n")
what = "PREFLIGHT" if "slurm/preflight.py" in sys.argv else "RANKS" if "slurm/rank.sh" in sys.argv else ""
sys.exit(subprocess.call(["bash", "-euc", os.environ.get(what, "")]))
""",
    "scontrol": '#!/bin/sh\n[ "$1" = show ] && printf "node1\\n${NODE:-node2}\\n" || echo "$*" >>$CALLS.scontrol\n',
    "squeue": '#!/bin/sh\ncase "$*" in *%e) date --date="@$END" +%FT%T ;; *) echo RUNNING ;; esac\n',
    "getent": '#!/bin/sh\n[ "$2" = node2 ] && echo "10.0.0.2 STREAM node2"\n',
    "ip": '#!/bin/sh\n[ "$4" = 10.0.0.2 ] && echo "10.0.0.2 dev ib7 src 10.0.0.1 uid 0"\n',
}


def in_seconds(left: int) -> str:
    """The time then, for `date`."""
    return str(int(time.time()) + left)


def run(script: str, folder: Path, **settings: str) -> tuple[int, str]:
    """Exit code and output of a job that ends at END, a day from now."""
    for name, text in STAND_INS.items():
        (folder / name).write_text(text.format(python=sys.executable) if name == "srun" else text)
        (folder / name).chmod(0o755)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "MEGAFORK")) and "IFNAME" not in name}
    own = {"PATH": f"{folder}:{clean['PATH']}", "MEGAFORK_LOGS": str(folder / "logs"), "CALLS": str(folder / "calls")}
    environment = clean | JOB | own | {"END": in_seconds(86400)} | settings
    with (folder / "output").open("w") as output:
        command = ["bash", f"slurm/{script}"]
        job = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output, start_new_session=True)
    try:
        return job.wait(timeout=60), (folder / "output").read_text()
    finally:  # as Slurm does, whatever the job has left behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, signal.SIGKILL)


def calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def processors(words: list[str]) -> str:
    """What srun takes: the last one counts."""
    return [word for word in words if word.startswith("--cpus-per-task=")][-1].partition("=")[2]


@pytest.mark.parametrize(("script", "parts"), [(RUNS[0], 2), *((script, 1) for script in (*RUNS, "evaluate.sh", "convert.sh"))])
def test_every_step_has_its_processors_and_both_interfaces(script: str, parts: int, tmp_path: Path) -> None:
    code, output = run(script, tmp_path, **(TWO_PARTS if parts == 2 else {}))
    assert code == 0, output
    made = calls(tmp_path)
    wanted = {(1, True): ["12", "12"], (2, True): ["11", "48", "11"], (1, False): ["12"]}[parts, script in RUNS]
    assert sorted(processors(call["words"]) for call in made) == sorted(wanted)
    assert {(call["NCCL_SOCKET_IFNAME"], call["GLOO_SOCKET_IFNAME"]) for call in made} == {("=ib7", "ib7")}


def test_there_is_no_srun_beside_the_one_that_all_share() -> None:
    lines = [line for file in ROOT.glob("slurm/*.sh") for line in file.read_text().splitlines()]
    starts = [line for line in lines if re.search(r"(^|[\s(;&|])srun\s+-", line) and not line.lstrip().startswith("#")]
    assert len(starts) == 1 and "--cpus-per-task=" in starts[0]


@pytest.mark.parametrize(
    ("given", "nccl", "gloo"),
    [
        ({"NCCL_SOCKET_IFNAME": "lo"}, "lo", "lo"),
        ({"NCCL_SOCKET_IFNAME": "=lo"}, "=lo", "lo"),
        ({"NCCL_SOCKET_IFNAME": "^docker,lo"}, "^docker,lo", "ib7"),
        ({"NCCL_SOCKET_IFNAME": "ib"}, "ib", "ib7"),
        ({"GLOO_SOCKET_IFNAME": "eth9"}, "=ib7", "eth9"),
        ({"NCCL_SOCKET_IFNAME": "ib", "GLOO_SOCKET_IFNAME": "eth9"}, "ib", "eth9"),
        ({"SLURM_JOB_NUM_NODES": "1"}, None, None),
        ({"NODE": "of-no-address"}, None, None),
    ],
)
def test_what_the_site_has_named_stays(given: dict[str, str], nccl: str | None, gloo: str | None, tmp_path: Path) -> None:
    code, output = run("evaluate.sh", tmp_path, **given)
    assert code == 0 and ("name it in slurm/site.sh" in output) == ("NODE" in given)
    (call,) = calls(tmp_path)
    assert (call["NCCL_SOCKET_IFNAME"], call["GLOO_SOCKET_IFNAME"]) == (nccl, gloo)


def test_the_planner_knows_the_deadlines_of_the_scripts() -> None:
    for name in RUNS:
        assert f"#SBATCH --signal=B:USR1@{WARNING_S}\n" in (ROOT / "slurm" / name).read_text()
    assert f"MEGAFORK_HANG_S:-{HANG_S}}}" in (ROOT / "slurm/common.sh").read_text()


SECONDS = st.floats(0.0, 1e6)


def step(rollout: float, score: float, update: float, refit: float) -> Step:
    return Step(rollout, score, update, refit, prompt=1.0, response=1.0, tokens=1, gpus=1, running=1, micro_batches=1)


@given(SECONDS, SECONDS, SECONDS, SECONDS, st.floats(1.0, 1e7), st.none() | st.floats(1.0, 1e7))
def test_what_a_refusal_advises_is_enough(
    rollout: float, score: float, update: float, refit: float, hang_s: float, left_s: float | None
) -> None:
    planned = step(rollout, score, update, refit)
    needs = Deadlines.of(planned)
    assert needs.warning >= max(WARNING_S, 1.5 * planned.seconds + 600) and needs.hang >= 1.5 * max(score, update, refit)
    told = list(needs.missed(hang_s, left_s))
    assert len(told) == (hang_s < needs.hang) + (left_s is not None and left_s < needs.warning)
    advice = {name: float(value) for name, value in re.findall(r"(MEGAFORK_HANG_S|--time)=(\d+)", " ".join(told))}
    left_s = 60 * advice["--time"] if "--time" in advice else left_s
    assert list(needs.missed(advice.get("MEGAFORK_HANG_S", hang_s), left_s)) == []


def test_field_value_and_fix_are_in_the_line() -> None:
    """Qwen3-8B on 8 GPUs, and one whose update takes hours."""
    assert list(Deadlines.of(step(4509, 377, 1361, 1)).missed(HANG_S, 86400)) == []
    assert list(Deadlines.of(step(4509, 377, 1361, 1)).missed(HANG_S, 3600)) == [
        "--time leaves the job 3,600 s, but a step and its checkpoint may take 10,020 s: "
        "give --time=167 (minutes) or more, or take more --nodes"
    ]
    assert list(Deadlines.of(step(100, 377, 8000, 1)).missed(HANG_S, None)) == [
        "MEGAFORK_HANG_S is 5400, but the update is planned to take about 8,000 s without a sign of life: "
        "set MEGAFORK_HANG_S=12000 or more, or take more --nodes"
    ]


@pytest.mark.parametrize(
    ("left", "hang", "refused"), [("90000", "5400", ""), ("", "5400", ""), ("600", "5400", "--time"), ("", "0", "MEGAFORK_HANG_S")]
)
@pytest.mark.parametrize("architecture", ["Qwen3", "Qwen3Moe"])
def test_the_preflight_compares_the_plan_with_the_job(
    architecture: str, left: str, hang: str, refused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"MEGAFORK_JOB": str(tmp_path), "MEGAFORK_TIME_LEFT_S": left, "MEGAFORK_HANG_S": hang}.items():
        monkeypatch.setenv(name, value)
    spec = recipe(save_model(tmp_path / "model", architecture))
    told = list(preflight.planned(spec, "train", 8, GPUS["h100"]))
    assert len(told) == bool(refused) and all(line.startswith(refused) for line in told)
    assert int((tmp_path / "warning_s").read_text()) == WARNING_S
    (tmp_path / "warning_s").unlink()
    assert not list(preflight.planned(spec, "sft", 8, GPUS["h100"])) and not (tmp_path / "warning_s").exists()


BEAT = 'beat() { echo "$1" >$MEGAFORK_JOB/heartbeat; }; '


@pytest.mark.slow
def test_a_step_that_gives_signs_of_life_may_take_longer_than_the_limit(tmp_path: Path) -> None:
    ranks = 'for n in 1 2 3 4 5 6; do beat "step 1, rollout, $n"; sleep 1; done'
    code, output = run(RUNS[0], tmp_path, RANKS=BEAT + ranks, MEGAFORK_HANG_S="4")
    assert code == 0 and "slurm: done" in output


@pytest.mark.slow
@pytest.mark.parametrize("ended", [False, True])
def test_one_that_gives_none_hangs(ended: bool, tmp_path: Path) -> None:
    """An engine that is called and called and draws nothing writes nothing. A run that has ended a step is worth another start."""
    ranks = ("echo 1 >$MEGAFORK_JOB/step; " if ended else "") + "beat 'step 2, rollout, 5 responses to finish'; sleep 60"
    code, output = run(RUNS[0], tmp_path, RANKS=BEAT + ranks, MEGAFORK_HANG_S="2")
    why = "no sign of life for 2 s, the last one: step 2, rollout, 5 responses to finish; a rank hangs"
    assert f"{why}; queued again" in output if ended else f"before the first step ended, {why}; not queued again" in output
    assert code == (0 if ended else 1) and (tmp_path / "calls.scontrol").exists() == ended


@pytest.mark.slow
def test_a_job_whose_planned_step_is_long_is_asked_to_stop_earlier(tmp_path: Path) -> None:
    ranks = "until [[ -f $MEGAFORK_JOB/stop ]]; do sleep 0.1; done; echo 'step 4' >$MEGAFORK_JOB/stopped; exit 1"
    code, output = run(RUNS[0], tmp_path, END=in_seconds(7004), RANKS=ranks, PREFLIGHT="echo 7000 >$MEGAFORK_JOB/warning_s")
    assert "will be asked to stop 7000 s before the job's time is over" in output
    assert re.search(r"asked to stop, 69[89]\d s before the job's time is over", output)
    assert "stopped on request after step 4; queued again" in output and code == 0
    assert (tmp_path / "calls.scontrol").read_text() == "requeue 7\n"
