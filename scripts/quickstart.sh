#!/usr/bin/env bash
# From a bare machine to a trained and evaluated FLASH model in a few minutes: bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment requirements.txt
workdir=runs/quickstart
"$PYTHON" train.py --config=configs/quickstart.py --workdir="$workdir"
"$PYTHON" eval.py --workdir="$workdir"
"$PYTHON" scripts/quickstart_report.py --workdir="$workdir"
