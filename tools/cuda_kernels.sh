#!/usr/bin/env bash
# Build Transformer Engine and apex's kernels from source into the virtual environment VENV, already set up from requirements-cuda.txt:
#   tools/cuda_kernels.sh VENV [--required]
# megafork runs without them, but slower and without FP8, so a package that cannot be built is reported in one line; with --required, it is
# an error. The compiler and headers are the list's own, which match torch's CUDA; a toolkit installed on the machine is not used.
#
# Settings, from the environment:
#   TORCH_CUDA_ARCH_LIST   GPU architectures to compile apex's kernels for (9.0;10.0: H100, H200, B200)
#   MAX_JOBS               parallel compilers (one per core, but at most one per 4 GB of memory)
#   TE_SOURCE, APEX_SOURCE sources, if they cannot be fetched: an sdist or a folder
set -euo pipefail

venv=$(realpath "$1") required=${2:-}
TE=2.11.0                                      # the newest that megatron-core 0.16 accepts
APEX=6424da3b4faa6c8f062da4a48c424fff3f02d42d  # a commit of July 2026; the last release is older than torch 2.13
python=$venv/bin/python
logs=$venv/build-logs
pip=("$venv/bin/pip" install --no-deps --no-build-isolation)

main() {
    mkdir -p "$logs"
    toolchain
    export NVTE_PYTORCH_FORCE_BUILD=TRUE   # otherwise its setup.py looks online for a prebuilt wheel
    build "Transformer Engine $TE" transformer_engine.pytorch \
        "transformer-engine==$TE" "transformer-engine-cu13==$TE" "${TE_SOURCE:-transformer-engine-torch==$TE}"
    export APEX_CPP_EXT=1 APEX_CUDA_EXT=1
    build "apex ${APEX:0:8}" fused_weight_gradient_mlp_cuda "${APEX_SOURCE:-git+https://github.com/NVIDIA/apex@$APEX}"
}

# Point the compilers at what the list has installed: nvcc, and one folder per package with headers and libraries.
toolchain() {
    local packages library name memory
    packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("platlib"))')/nvidia
    export CUDA_HOME=$packages/cu13 CPATH LIBRARY_PATH=$venv/build-libraries
    export PATH=$venv/bin:$CUDA_HOME/bin:$PATH TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-9.0;10.0}
    CPATH=$(printf '%s:' "$packages"/*/include)
    mkdir -p "$LIBRARY_PATH"
    shopt -s nullglob
    for library in "$packages"/*/lib/*.so.*; do   # packages contain libcudart.so.13, but the linker looks for libcudart.so
        name=$(basename "$library")
        ln -sf "$library" "$LIBRARY_PATH/${name%%.so*}.so"
    done
    memory=$(awk '/MemAvailable/ {print int($2 / 4e6) + 1}' /proc/meminfo)
    export MAX_JOBS=${MAX_JOBS:-$((memory < $(nproc) ? memory : $(nproc)))}
}

# build NAME MODULE PIP_ARGUMENT...: does nothing if MODULE can already be imported.
build() {
    local name=$1 module=$2 log=$logs/$2.log reason
    if loads "$module" >/dev/null 2>&1; then say "$name is there"; return; fi
    reason=$(missing)
    if [[ -z $reason ]]; then
        say "$name is being built with MAX_JOBS=$MAX_JOBS, which takes a quarter of an hour or more: $log"
        if { "${pip[@]}" "${@:3}" && loads "$module"; } >"$log" 2>&1; then say "$name is built"; return; fi
        reason="the build failed, and the end of $log says why"
    fi
    say "$name is skipped: $reason"
    if [[ $required == --required ]]; then exit 1; fi
}

# Prints what the machine lacks for a build; nothing if it has everything.
missing() {
    command -v "${CXX:-c++}" >/dev/null || { echo "no C++ compiler: install g++"; return; }
    [[ -x $CUDA_HOME/bin/nvcc ]] || { echo "no nvcc in $CUDA_HOME: install requirements-cuda.txt"; return; }
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null ||
        echo "Python's headers are missing: install python3-dev"
}

loads() { "$python" -c "import torch, $1"; }

say() { echo "cuda_kernels: $*"; }

main
