#!/usr/bin/env bash
# Runs a sweep on several Cloud TPU VMs of one host each, a point a chip; arguments go to scripts/sweep.py:
#
#     TPUS="sweep-0 sweep-1" ZONE=us-central2-b bash scripts/launch/tpu_vm_sweep.sh \
#         --config=configs/paper/mixed_chunk.py --sweep=models,seed:3 --workdir=/shared/runs/mixed_chunk
#
# Every VM gets the same command: a point whose directory another one has locked is left to it. So the file system that
# they share must know locks (Filestore does). Before, on every VM: the repository in ~/gau, ~/gau/.venv with
# requirements.txt and "jax[tpu]". Ctrl-C here does not stop them; see below. The same command goes on.
set -uo pipefail
: "${TPUS:?the names of the TPU VMs, in quotes}" "${ZONE:?their zone}"

processes=()
for tpu in $TPUS; do
  gcloud compute tpus tpu-vm ssh "$tpu" --zone="$ZONE" --worker=all \
    --command="cd ~/gau && exec .venv/bin/python scripts/sweep.py$(printf ' %q' "$@")" </dev/null &
  processes+=($!)
done
code=0
for process in "${processes[@]}"; do
  wait "$process" || code=$?
done
exit "$code"

# To stop and save, from another terminal, for each VM:
#     gcloud compute tpus tpu-vm ssh NAME --zone="$ZONE" --worker=0 --command='pkill -TERM -f scripts/sweep.py'
