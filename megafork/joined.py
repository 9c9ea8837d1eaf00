"""The environment of ranks: what the launcher gives its own, and that of ranks started by torchrun or Slurm, checked first."""

from __future__ import annotations

import os
import re

from megafork.recipe import RecipeError
from megafork.secret import FIX, NAME, is_loopback, secret

STORE = "MEGAFORK_STORE"
"""Environment variable with the path of the file through which the launcher's ranks meet."""
_LOOPBACK = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
_MEETING = ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def joined() -> bool:
    """Whether torchrun or Slurm has started this process as a rank, which the environment then describes.

    Raises RecipeError if that environment is incomplete or inconsistent, and if ranks on several machines have no secret.
    """
    if "RANK" not in os.environ and not _join_slurm():
        return False
    fix = "unset RANK to have megafork start the ranks itself, or start it with torchrun or srun, which set all of them"
    rank = os.environ["RANK"]
    for name in _MEETING:
        if not os.environ.get(name):
            raise RecipeError(f"RANK is {rank!r}, so another program started this rank, but {name} is not set: {fix}")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT", "LOCAL_RANK"):
        if not re.fullmatch(r"\d{1,9}", os.environ.get(name, "0")):
            raise RecipeError(f"{name} is {os.environ[name]!r}, not a number: {fix}")
    if not int(rank) < int(os.environ["WORLD_SIZE"]):
        raise RecipeError(f"RANK is {rank!r} and WORLD_SIZE {os.environ['WORLD_SIZE']!r}: ranks are counted from 0; {fix}")
    if not 0 < int(os.environ["MASTER_PORT"]) < 1 << 16:
        raise RecipeError(f"MASTER_PORT is {os.environ['MASTER_PORT']!r}: ports are 1 to 65535; {fix}")
    if secret() is None and not on_one_machine():
        raise RecipeError(f"MASTER_ADDR is {os.environ['MASTER_ADDR']!r}, which other machines can reach, and {NAME} is not set: {FIX}")
    return True


def on_one_machine() -> bool:
    """Whether all ranks are on this machine: by torchrun's count of local ranks, else because they meet at a loopback address."""
    return os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"] or is_loopback(os.environ["MASTER_ADDR"])


def loopback(*, reaches_out: bool) -> dict[str, str]:
    """Environment variables to add for ranks that are all on this machine, except those the user has set.

    `reaches_out`: the ranks send weights to other machines by NCCL, which has one interface setting per process.
    """
    names = {"GLOO_SOCKET_IFNAME"} if reaches_out else set(_LOOPBACK)
    return {name: _LOOPBACK[name] for name in names if name not in os.environ}


def _join_slurm() -> bool:
    """Under srun without torchrun, take rank, world size and address from Slurm's environment. False outside a step of several tasks.

    A batch script's own shell is not in a step, so `megafork` starts its ranks itself there. Use srun --kill-on-bad-exit.
    """
    step = {name: os.environ.get(f"SLURM_{name}", "") for name in ("PROCID", "STEP_NUM_TASKS", "STEP_NODELIST", "JOB_ID", "STEP_ID")}
    if not (step["PROCID"] and step["STEP_NODELIST"] and int(step["STEP_NUM_TASKS"] or 1) > 1):
        return False
    os.environ.update(RANK=step["PROCID"], WORLD_SIZE=step["STEP_NUM_TASKS"], LOCAL_RANK=os.environ.get("SLURM_LOCALID", "0"))
    alone = os.environ.get("SLURM_STEP_NUM_NODES") == "1"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if alone else first_host(step["STEP_NODELIST"]))
    os.environ.setdefault("MASTER_PORT", str(20000 + (int(step["JOB_ID"] or 0) * 8 + int(step["STEP_ID"] or 0)) % 20000))
    return True


def first_host(nodes: str) -> str:
    """First name of a Slurm node list: `rack[1-2]node[003-010,12],login` is rack1node003. Slurm puts rank 0 there."""
    match = re.match(r"(?:[^,\[\]]|\[[\w,-]+\])+", nodes)
    if match is None:
        raise RecipeError(f"SLURM_STEP_NODELIST is {nodes!r}: it names no node; set MASTER_ADDR to the host of rank 0")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", match[0])
