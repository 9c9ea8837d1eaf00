# megafork with its CUDA stack, Transformer Engine and apex: docs/install.md.
#   docker build --tag megafork .
# Nothing in it belongs to a particular user, so it runs as any: only mounted folders and $HOME are written to.
FROM nvidia/cuda:13.0.1-devel-ubuntu24.04

SHELL ["/bin/bash", "-euo", "pipefail", "-c"]

# Compilers and Python's headers stay in the image: Triton and vLLM compile at run time. bubblewrap is the verifiers' sandbox.
RUN apt-get update && \
    apt-get install --yes --no-install-recommends python3.12 python3.12-venv python3.12-dev g++ git ca-certificates bubblewrap && \
    rm -rf /var/lib/apt/lists/*

# What changes least comes first: a change to megafork's own code rebuilds only the last layers, and no kernels.
WORKDIR /opt/megafork
COPY requirements-cuda.txt ./
RUN python3.12 -m venv /opt/venv && \
    /opt/venv/bin/pip install --no-cache-dir --no-deps --requirement requirements-cuda.txt
COPY tools/cuda_kernels.sh tools/
RUN tools/cuda_kernels.sh /opt/venv --required && \
    rm -rf /opt/venv/build-logs /root/.cache

COPY pyproject.toml README.md ./
COPY megafork megafork
COPY recipes recipes
COPY slurm slurm
RUN /opt/venv/bin/pip install --no-cache-dir --no-deps --no-build-isolation --editable . && \
    chmod --recursive a+rX .

ENV PATH=/opt/venv/bin:$PATH
CMD ["megafork", "doctor"]
