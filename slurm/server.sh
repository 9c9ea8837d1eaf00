#!/usr/bin/env bash
# srun starts one of these a roll-out server. The servers of a node share its GPUs and have ports of their own, from 8000 on.
# One that ends is started again: the trainer goes on with the others meanwhile, and takes it back with the current weights.
exec >>"$MEGAFORK_JOB/server_$SLURM_PROCID.log" 2>&1
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
servers_here=${SLURM_STEP_TASKS_PER_NODE%%[^0-9]*}
each=$((${#gpus[@]} / servers_here))
CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:SLURM_LOCALID*each:each}")
export CUDA_VISIBLE_DEVICES
until python -m megafork.rollout.serve "$MEGAFORK_JOB/recipe.yaml" --host 0.0.0.0 --port $((8000 + SLURM_LOCALID)); do sleep 5; done
