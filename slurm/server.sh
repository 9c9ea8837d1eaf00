#!/usr/bin/env bash
# srun starts one of these per roll-out server. The servers of a node share its GPUs and have consecutive ports from 8000.
# A server that ends is restarted: the trainer meanwhile continues with the others, then gives it the current weights and uses it again.
exec >>"$MEGAFORK_JOB/server_$SLURM_PROCID.log" 2>&1
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"
servers_here=${SLURM_STEP_TASKS_PER_NODE%%[^0-9]*}
each=$((${#gpus[@]} / servers_here))
CUDA_VISIBLE_DEVICES=$(IFS=, && echo "${gpus[*]:SLURM_LOCALID*each:each}")
export CUDA_VISIBLE_DEVICES
until python -m megafork.rollout.serve "$MEGAFORK_JOB/recipe.yaml" --host 0.0.0.0 --port $((8000 + SLURM_LOCALID)); do sleep 5; done
