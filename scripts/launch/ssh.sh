#!/usr/bin/env bash
# Trains on several machines over ssh, one process on each with all of its GPUs; further arguments go to train.py:
#
#     bash scripts/launch/ssh.sh "host1 host2" --config=configs/lm.py:size=base --workdir=/shared/runs/first
#
# The repository must lie at the same path on all machines, the work directory and the data on a file system that all
# see. Interrupt with Ctrl-C: all save at the same step; the same command resumes.
#     PORT=29400      on which the first host waits for the others
#     PYTHON=python   on every host
set -uo pipefail
read -ra hosts <<<"${1:?usage: ssh.sh "HOST1 HOST2 ..." --config=... --workdir=...}"
shift
port=${PORT:-29400}
process_file=/tmp/gau_launch_$$

# A signal to one process is enough: they agree on the step after which all save.
stop() {
  ssh "${hosts[0]}" "kill -TERM \$(cat $process_file)"
}
trap stop INT TERM

arguments=$(printf ' %q' "$@")
processes=()
for index in "${!hosts[@]}"; do
  # In a session of its own, so that Ctrl-C here does not cut the connection.
  setsid ssh "${hosts[$index]}" "cd $(printf %q "$PWD") && echo \$\$ >$process_file && exec ${PYTHON:-python} train.py$arguments \
    --coordinator_address=${hosts[0]}:$port --num_processes=${#hosts[@]} --process_id=$index" </dev/null &
  processes+=($!)
done

code=0
for process in "${processes[@]}"; do
  wait "$process"
  last=$?
  # A signal to this script ends a wait before the process has ended.
  while kill -0 "$process" 2>/dev/null; do
    wait "$process"
    last=$?
  done
  ((code == 0)) && code=$last
done
exit "$code"
