#!/usr/bin/env bash
# Runs a sweep as a job array of a Slurm cluster, a point a job; all arguments go to scripts/sweep.py:
#
#     sbatch --array=0-11 scripts/launch/slurm_sweep.sh --config=configs/paper/mixed_chunk.py \
#         --sweep=models,seed:3 --workdir=/shared/runs/mixed_chunk
#
# The numbers are those of the points: the same command with --dry_run in place of --workdir lists them. Submit from the
# repository, with the Python environment active; directory and data must be on a file system that all nodes see. Two
# minutes before the time limit the run saves, and its job queues again and resumes. The same command submitted again
# runs what is not finished.
#SBATCH --job-name=gau-sweep
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gau-sweep-%A_%a.log
set -uo pipefail

again=no
time_is_up() {
  again=yes
  kill -TERM "$sweep" # it stops its run, saved, and exits with 143
}
trap time_is_up USR1

python scripts/sweep.py "$@" --point="$SLURM_ARRAY_TASK_ID" &
sweep=$!
wait "$sweep"
code=$?
if [[ $again == yes ]]; then
  wait "$sweep" # the signal had ended the first wait
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID"
fi
exit "$code"
