# Sourced by the other scripts: environment REQUIREMENTS_FILE... sets $PYTHON to an interpreter that has them.
# An active virtual or conda environment that meets them is used as it is; otherwise .venv is made, or reused.

environment() {
  local check="scripts/check_requirements.py" file flags=()
  for file in "$@"; do flags+=(-r "$file"); done
  if [[ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]]; then
    PYTHON="$(command -v python)"
    if "$PYTHON" "$check" "$@" >/dev/null 2>&1; then
      echo "environment: using the active one, $PYTHON" >&2
      return
    fi
    echo "environment: the active one lacks requirements, using .venv" >&2
  fi
  PYTHON="$PWD/.venv/bin/python"
  if [[ -x "$PYTHON" ]] && "$PYTHON" "$check" "$@" >/dev/null 2>&1; then
    echo "environment: reusing .venv" >&2
    return
  fi
  # Without pip it was interrupted while being made, and would fail for good.
  if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
    rm -rf .venv
    local candidate system=""
    for candidate in python3 python3.13 python3.12 python3.11 python; do
      if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
        system="$candidate"
        break
      fi
    done
    if [[ -z "$system" ]]; then
      echo "error: no Python >= 3.11 on the PATH" >&2
      return 2
    fi
    echo "environment: making .venv with $("$system" --version)" >&2
    if ! "$system" -m venv .venv; then
      rm -rf .venv
      echo "error: '$system -m venv' failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
      return 2
    fi
  fi
  echo "environment: installing $* (about a minute)" >&2
  "$PYTHON" -m pip install --quiet --disable-pip-version-check "${flags[@]}" || return 1
}
