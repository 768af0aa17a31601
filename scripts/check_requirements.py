"""Exits with 0 if this Python has what the given requirements files ask for; else prints what is missing."""

import importlib.metadata
import sys
from pathlib import Path

try:
    from packaging.requirements import Requirement  # every environment that has the requirements has it
except ImportError:
    from pip._vendor.packaging.requirements import Requirement  # a bare one has pip


def main() -> int:
    """Checks every line of every file named on the command line."""
    missing = []
    for path in sys.argv[1:]:
        for line in Path(path).read_text().splitlines():
            text = line.split('#')[0].strip()
            if text and not _satisfied(Requirement(text)):
                missing.append(text)
    if missing:
        print('missing: ' + ', '.join(missing))
    return 1 if missing else 0


def _satisfied(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate():
        return True
    try:
        return requirement.specifier.contains(importlib.metadata.version(requirement.name), prereleases=True)
    except importlib.metadata.PackageNotFoundError:
        return False


if __name__ == '__main__':
    sys.exit(main())
