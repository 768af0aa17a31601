#!/usr/bin/env bash
# Makes the environment if needed and runs the tests: bash scripts/test.sh [pytest arguments]
# One worker a core, up to four; -n 0 runs in one process (for a debugger, say). A file stays with one worker, for its
# tests share compiled programs and runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment requirements.txt requirements-test.txt
# Programs that the tests start would else compile all of the project's Python again, each of them.
unset PYTHONDONTWRITEBYTECODE
# Files in the order of tests/conftest.py, which puts the longest tests first, not those with most tests.
exec "$PYTHON" -m pytest -n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder "$@"
