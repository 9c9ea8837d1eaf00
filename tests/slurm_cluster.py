"""A real Slurm on this machine: a controller and two nodes, each with its own name, address, processes and (fake) GPUs.

Needs root and Debian's packages slurmctld, slurmd, slurm-client and munge. The cluster lives in namespaces inside one PID namespace:
ending its first process ends every daemon and job and removes all network interfaces. It also ends with this process, even after
SIGKILL. Nothing is written outside the cluster's own folder.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

NODES = ("node1", "node2")
GPUS = 8
PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "srun", "munged", "ip", "nsenter", "unshare", "setpriv")
UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc")
BOOT = """
hostname "$0"
mount --bind "$1" /etc/hosts
mount -t tmpfs shm /dev/shm
ip link set lo up
echo up
sleep infinity &
wait  # as the first process of its namespace, bash also reaps orphans
"""
NETWORK = "10.99.0."  # inside of the cluster's own network namespace

CONFIG = """
ClusterName=megafork
SlurmctldHost=controller({network}254)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdTimeout=12
MessageTimeout=10
TCPTimeout=2
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
MinJobAge=3600
PropagateResourceLimits=NONE
MpiDefault=none
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES State=UP
"""
NODE = "NodeName={name} NodeAddr={network}{number} CPUs=8 RealMemory=64000 Gres=gpu:{gpus}\n"


def missing() -> str | None:
    """Why there can be no cluster here, or None."""
    absent = [program for program in PROGRAMS if shutil.which(program) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install {' '.join(PACKAGES)} iproute2"
    if os.geteuid() != 0:
        return "namespaces for the nodes need root"
    tried = subprocess.run(
        ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--mount-proc", "true"], capture_output=True, text=True
    )
    return f"no namespaces here: {tried.stderr.strip()}" if tried.returncode else None


class Cluster:
    """Use `running_cluster`. Commands run on the controller, so `sbatch` and the like find it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._write_config()
        self._controller = _Machine("controller", ["setpriv", "--pdeathsig", "KILL"], folder)
        self._nodes: dict[str, _Machine] = {}
        try:
            self._controller.run("ip", "link", "add", "switch", "type", "bridge")
            self._controller.run("ip", "address", "add", f"{NETWORK}254/24", "dev", "switch")
            self._controller.run("ip", "link", "set", "switch", "up")
            munge = ("--key-file", "--socket", "--pid-file", "--log-file", "--seed-file")
            files = (f"{folder}/munge.{name}" for name in ("key", "socket", "pid", "log", "seed"))
            self._controller.run("munged", "--force", *(word for pair in zip(munge, files, strict=True) for word in pair))
            self._controller.run("slurmctld", "-f", str(folder / "slurm.conf"))
            for name in NODES:
                self.power_on(name)
        except BaseException:
            self.close()
            raise

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        """Standard output of a command on the controller. Raises CalledProcessError, with what it said."""
        return self._controller.run(*command, cwd=cwd, SLURM_CONF=str(self.folder / "slurm.conf"), **environment)

    def power_on(self, name: str) -> None:
        """Start a node, and wait until jobs can run on it."""
        node = _Machine(name, self._controller.enter, self.folder)
        self._nodes[name] = node
        self._controller.connect(node, NODES.index(name) + 1)
        node.run("slurmd", "-f", str(self.folder / "slurm.conf"), "-N", name)
        wait_for(lambda: self.node_state(name) == "idle", 30, lambda: f"{name} is {self.node_state(name)}: {self.logs()}")

    def power_off(self, name: str) -> None:
        """All of a sudden: the network falls silent, without a word to its peers, and every process is gone."""
        node = self._nodes.pop(name)
        self._controller.run("ip", "link", "delete", node.name)
        node.kill()

    def node_state(self, name: str) -> str:
        return self.run("sinfo", "--noheader", "--nodes", name, "--format", "%T").strip()

    def processes(self, mark: str) -> list[psutil.Process]:
        """All processes of the machine that have `mark` in their environment."""
        found = []
        for process in psutil.process_iter():
            try:
                if mark in process.environ().values() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # gone
                continue
        return found

    def logs(self) -> str:
        return "".join(f"\n--- {file.name}\n{file.read_text()[-3000:]}" for file in sorted(self.folder.glob("*.log")))

    def close(self) -> None:
        self._controller.kill()

    def _write_config(self) -> None:
        (self.folder / "state").mkdir()
        (self.folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (self.folder / "munge.key").chmod(0o600)
        for gpu in range(GPUS):
            os.mknod(self.folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))  # as good as /dev/null
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{GPUS - 1}]\n")
        nodes = [NODE.format(name=name, network=NETWORK, number=n + 1, gpus=GPUS) for n, name in enumerate(NODES)]
        (self.folder / "slurm.conf").write_text(CONFIG.format(folder=self.folder, network=NETWORK) + "".join(nodes))
        hosts = [f"{NETWORK}254 controller", *(f"{NETWORK}{n + 1} {name}" for n, name in enumerate(NODES))]
        (self.folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(f"{line}\n" for line in hosts))


class _Machine:
    """Namespaces that look like a machine: own host name, network, processes, /etc/hosts and /dev/shm."""

    def __init__(self, name: str, inside: list[str], folder: Path) -> None:
        """`inside`: the command that leads into the surrounding machine."""
        self.name = name
        self._folder = folder
        boot = [*inside, *UNSHARE, "bash", "-euc", BOOT, name, str(folder / "hosts")]
        with (folder / "machines.log").open("a") as said:
            self._outer = subprocess.Popen(boot, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said, text=True)
        assert self._outer.stdout is not None and self._outer.stdout.readline() == "up\n", f"{name} does not start"
        self._first = next(p for p in psutil.Process(self._outer.pid).children(recursive=True) if p.name() == "bash")

    @property
    def enter(self) -> list[str]:
        return ["nsenter", "--target", str(self._first.pid), "--net", "--mount", "--uts", "--pid"]

    def run(self, *command: str, cwd: Path | None = None, **environment: str) -> str:
        here = ["env", f"--chdir={cwd or self._folder}"]  # a mount namespace is entered at its root
        for _ in range(5):
            words, variables = [*self.enter, *here, *command], {**os.environ, **environment}
            done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=60)
            if done.returncode != -signal.SIGPIPE:  # a busy controller hangs up on Slurm's commands
                break
        if done.returncode:
            raise AssertionError(f"{' '.join(command)} on {self.name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def connect(self, node: _Machine, number: int) -> None:
        """A cable from this machine's switch to the node, whose adapter keeps its address when it is started again."""
        network_only = ["nsenter", "--target", str(self._first.pid), "--net"]  # the node's id below is one of the host's
        cable = (
            f"ip link add {node.name} master switch up type veth peer name eth0 address 02:00:00:00:00:{number:02x} netns {node._first.pid}"
        )
        subprocess.run([*network_only, *cable.split()], check=True)
        node.run("ip", "address", "add", f"{NETWORK}{number}/24", "dev", "eth0")
        node.run("ip", "link", "set", "eth0", "up")

    def kill(self) -> None:
        """The first process of a PID namespace takes all others along."""
        self._first.send_signal(signal.SIGKILL)
        self._outer.wait(10)


@contextmanager
def running_cluster() -> Iterator[Cluster]:
    """A cluster with all nodes idle; afterwards nothing is left of it."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # short: sockets in it have long names
        cluster = Cluster(Path(folder))
        try:
            yield cluster
        finally:
            cluster.close()


def wait_for(ready: Callable[[], bool], limit_s: float, state: Callable[[], str]) -> None:
    deadline = time.monotonic() + limit_s
    while not ready():
        assert time.monotonic() < deadline, state()
        time.sleep(0.1)
