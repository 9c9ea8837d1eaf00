#!/usr/bin/env bash
# srun starts one of these a rank: rank 0 speaks in the job's own log, every other one in a file; why a rank failed goes to rank_N.error.
[[ $SLURM_PROCID == 0 ]] || exec >>"$MEGAFORK_JOB/rank_$SLURM_PROCID.log" 2>&1
export TORCHELASTIC_ERROR_FILE=$MEGAFORK_JOB/rank_$SLURM_PROCID.error
exec "$@"
