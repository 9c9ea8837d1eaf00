#!/usr/bin/env bash
# Convert weights between Hugging Face and Megatron, without GPUs. Run it from the repository's root; arguments go to `megafork convert`:
#   sbatch slurm/convert.sh hf-to-megatron models/Qwen3-32B models/Qwen3-32B-megatron --tp 4 --pp 4
#SBATCH --job-name=megafork-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=16
#SBATCH --mem=128G
#SBATCH --time=02:00:00
#SBATCH --output=slurm-%j.log

source slurm/common.sh || exit 2
"${STEP[@]}" megafork convert "$@"
