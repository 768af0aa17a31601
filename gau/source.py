"""Which commit of the repository is running."""

import os
import subprocess
from pathlib import Path

VARIABLE = 'GAU_COMMIT'
_ROOT = Path(__file__).resolve().parents[1]


def commit() -> str | None:
    """Returns the commit that the repository is at, with `+` if its files were changed; None if that is not known.

    A copy of the repository without git, as in an image, is told its commit by the environment variable GAU_COMMIT.
    """
    if VARIABLE in os.environ:
        return os.environ[VARIABLE]
    try:
        git = ('git', '-C', str(_ROOT))
        head = subprocess.run([*git, 'rev-parse', '--short=10', 'HEAD'], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, 'status', '--porcelain', '--untracked-files=no'], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ('+' if changed.stdout.strip() else '')
