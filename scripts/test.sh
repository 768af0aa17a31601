#!/usr/bin/env bash
# Makes the environment if needed and runs the tests: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment requirements.txt requirements-test.txt
exec "$PYTHON" -m pytest "$@"
