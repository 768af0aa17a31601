"""Where Pallas kernels for TPUs run: on a TPU, or interpreted on a CPU, to test the very kernels without one."""

import os


def interpreted() -> bool:
    """Whether kernels run in Pallas' interpreter: where the environment variable GAU_PALLAS_INTERPRET is 1."""
    return os.environ.get('GAU_PALLAS_INTERPRET', '0') == '1'
