#!/usr/bin/env bash
# Trains on the GPUs of several nodes of a Slurm cluster; all arguments go to train.py:
#
#     sbatch scripts/launch/slurm.sh --config=configs/lm.py:model=flash,size=base --config.mesh.fsdp=-1 \
#         --config.mesh.data=1 --config.data.streams=16 --workdir=/shared/runs/flash
#
# Submit from the repository, with the Python environment active. The work directory and the data must be on a file
# system that all nodes see. Two minutes before the time limit the run saves, and the job queues again and resumes.
#SBATCH --job-name=gau
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
# One process a GPU. JAX takes of all GPUs of the node the one with the number of the task, so each task must see all of
# them: not --gpus-per-task.
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=gau-%j.log
set -uo pipefail

again=no
time_is_up() {
  again=yes
  scancel --signal=TERM "$SLURM_JOB_ID" # to the tasks: they finish their step, save and exit with 143
}
trap time_is_up USR1

# train.py finds the other processes in Slurm's environment. If one fails, the others need not wait for it.
srun --kill-on-bad-exit=1 python train.py "$@" &
wait $!
code=$?
if [[ $again == yes ]]; then
  wait $! # the signal had ended the first wait
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
