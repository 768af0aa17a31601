#!/usr/bin/env bash
# From a bare machine to a trained and evaluated FLASH model in a few minutes: bash scripts/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment requirements.txt
workdir=runs/quickstart
"$PYTHON" train.py --config=configs/quickstart.py --workdir="$workdir"
# During training a part of the held-out text is enough; the result is on all of it.
"$PYTHON" eval.py --workdir="$workdir" --max_tokens=1000000
"$PYTHON" scripts/quickstart_report.py --workdir="$workdir"
