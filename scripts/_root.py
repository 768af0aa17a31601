"""Importing this first lets a script import the repository it lies in, from whatever directory it is called."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
