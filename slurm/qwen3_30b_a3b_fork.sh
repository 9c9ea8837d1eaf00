#!/usr/bin/env bash
# Qwen3-30B-A3B, trained at its forking tokens. Run it from the repository's root; arguments are recipe overrides:
#   sbatch --nodes 8 slurm/qwen3_30b_a3b_fork.sh train.steps=500
# Roll-outs on separate nodes instead of the trainer's GPUs; each task of the part after the colon is one server on rollout.tp GPUs:
#   sbatch --nodes 6 : --nodes 2 --ntasks-per-node 2 --gpus-per-node 8 --cpus-per-task 48 --mem 0 --exclusive \
#       slurm/qwen3_30b_a3b_fork.sh rollout.park_training=false
# The job is asked to stop 45 minutes before its time limit, earlier if a step takes longer, and resumes in a new allocation.
#SBATCH --job-name=qwen3-30b-a3b-fork
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@2700
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.log

source slurm/common.sh || exit 2
run "${MEGAFORK_COMMAND:-train}" "${RECIPE:-recipes/qwen3_30b_a3b_fork.yaml}" "$@"
