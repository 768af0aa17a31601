#!/usr/bin/env bash
# Trains on all hosts of a Cloud TPU VM slice; arguments go to train.py:
#
#     TPU=my-v4-64 ZONE=us-central2-b bash scripts/launch/tpu_vm.sh --config=configs/lm.py:size=base \
#         --config.data.streams=8 --workdir=/shared/runs/first
#
# Before, on every host (the same command with --command="..."): clone the repository into ~/gau, make ~/gau/.venv with
# requirements.txt and "jax[tpu]", and mount one file system (Filestore, for example) that holds data and work directory.
# train.py asks the TPU's metadata which hosts there are.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all \
  --command="cd ~/gau && exec .venv/bin/python train.py$(printf ' %q' "$@")"

# To stop and save, from another terminal; one host is enough, the same command resumes:
#     gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=0 --command='pkill -TERM -f train.py'
