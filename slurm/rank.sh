#!/usr/bin/env bash
# srun starts one of these per rank: rank 0 writes to the job's own log, every other rank to its own file; errors go to rank_N.error.
[[ $SLURM_PROCID == 0 ]] || exec >>"$MEGAFORK_JOB/rank_$SLURM_PROCID.log" 2>&1
export TORCHELASTIC_ERROR_FILE=$MEGAFORK_JOB/rank_$SLURM_PROCID.error
exec "$@"
