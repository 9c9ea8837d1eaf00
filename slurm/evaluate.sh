#!/usr/bin/env bash
# avg@k and pass@k of a model on one node. Run it from the repository's root; arguments go to `megafork eval`:
#   sbatch slurm/evaluate.sh runs/qwen3_32b_fork/hf --benchmarks aime24,aime25
#SBATCH --job-name=megafork-eval
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --mem=0
#SBATCH --exclusive
#SBATCH --time=08:00:00
#SBATCH --output=slurm-%j.log

source slurm/common.sh || exit 2
"${STEP[@]}" megafork eval "$@"
