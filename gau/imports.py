"""Keeps libraries from importing what takes seconds and is not needed."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_pytorch() -> Iterator[None]:
    """Context in which `import torch` fails, as where it is not installed; one that was imported before stays.

    For libraries that import PyTorch wherever it is installed, to know its tensors: of ours they never see one.
    """
    hide = 'torch' not in sys.modules
    if hide:
        sys.modules['torch'] = None
    try:
        yield
    finally:
        if hide:
            del sys.modules['torch']
