"""The Triton kernels compiled for Hopper and Blackwell without a GPU: nothing spills, and logits travel 128 bits at a time.

Vocabularies of the supported families split into multiples of 16 columns per rank, which the launcher's specialisation sees at run time.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
nvidia = pytest.importorskip("triton.backends.nvidia")
ASSEMBLERS = {90: "ptxas", 100: "ptxas-blackwell"}
VECTORS = ("targets", "temperatures", "top", "log_total", "scale", "constant", "by_entropy", "stats")
POINTERS = {"targets": "*i64", **dict.fromkeys(VECTORS[1:], "*fp32")}
ALIGNED = (*VECTORS, "gradient", "logits", "gradient_stride", "logits_stride", "columns")

pytestmark = pytest.mark.slow


def compiled(name: str, arch: int, types: dict[str, str], constants: dict[str, Any]) -> str:
    """PTX of a kernel of `parallel.kernels`, whose pointers, strides and columns are multiples of 16, as the launcher would find them."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from megafork.parallel import kernels

    kernel = getattr(kernels, name)
    known = {**POINTERS, **types}
    signature = {arg: "constexpr" if arg in constants else known.get(arg, "i32") for arg in kernel.arg_names}
    hints = {(place,): [["tt.divisibility", 16]] for place, arg in enumerate(kernel.arg_names) if arg in ALIGNED}
    source = ASTSource(kernel, signature, {(kernel.arg_names.index(arg),): value for arg, value in constants.items()}, hints)
    return str(triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": kernels._WARPS}).asm["ptx"])


@pytest.mark.parametrize("arch", ASSEMBLERS)
@pytest.mark.parametrize(
    ("name", "types", "constants"),
    [
        ("_stats_kernel", {"logits": "*fp32"}, {}),
        ("_stats_kernel", {"logits": "*bf16"}, {}),
        ("_gradient_kernel", {"logits": "*fp32", "gradient": "*fp32"}, {"WITH_ENTROPY": True}),
        ("_gradient_kernel", {"logits": "*fp32", "gradient": "*bf16"}, {"WITH_ENTROPY": False}),
    ],
    ids=["stats fp32", "stats bf16", "gradient in place", "gradient in bf16"],
)
def test_nothing_spills_and_logits_travel_128_bits_at_a_time(
    name: str, types: dict[str, str], constants: dict[str, Any], arch: int, tmp_path: Path
) -> None:
    from megafork.parallel import kernels

    ptx = compiled(name, arch, types, {**constants, "BLOCK": kernels._BLOCK})
    (tmp_path / "kernel.ptx").write_text(ptx)
    assembler = Path(nvidia.__file__).parent / "bin" / ASSEMBLERS[arch]
    command = [str(assembler), "-v", f"--gpu-name=sm_{arch}a", "-o", str(tmp_path / "kernel.cubin"), str(tmp_path / "kernel.ptx")]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert re.findall(r"(\d+) bytes spill (?:stores|loads)", report) == ["0", "0"]
    assert int(re.findall(r"Used (\d+) registers", report)[0]) <= 128
    assert re.search(r"ld\.global[\w.:]*\.v4\.b32", ptx)
    if name == "_gradient_kernel":
        wide = "v4" if types["gradient"] == "*fp32" else r"v[24]"
        assert re.search(rf"st\.global[\w.:]*\.{wide}\.b32", ptx)
