"""A process that measures cells: `python -m gau.benchmarks.worker FD`, started by `gau.benchmarks.processes`.

Cells come on stdin, a line of JSON each; each one's result goes to the file descriptor FD, a line of JSON. What went
wrong in a way that has a name (bad settings, no memory) is the result's `error`; anything else is a traceback on stderr
and an exit code.
"""

import json
import os
import sys
from typing import Any

from gau.benchmarks.cells import Cell
from gau.errors import UserError


def main(arguments: list[str]) -> None:
    """Measures the cells as they come, until there are no more."""
    with os.fdopen(int(arguments[0]), 'w', buffering=1) as results:
        for line in sys.stdin:
            results.write(json.dumps(_result(Cell.from_dict(json.loads(line)))) + '\n')


def _result(cell: Cell) -> dict[str, Any]:
    result: dict[str, Any] = {}
    try:
        _measure(cell, result)
    except UserError as error:
        result['error'] = ' '.join(str(error).split())
    except Exception as error:
        if not _out_of_memory(error):
            raise
        result['error'] = 'out of memory'
    return result


def _measure(cell: Cell, result: dict[str, Any]) -> None:
    if cell.by_torch:
        from gau.benchmarks import torch_baselines

        torch_baselines.measure(cell, result)
        return
    import jax

    from gau.benchmarks import decoding, training
    from gau.training.setup import use_compilation_cache

    use_compilation_cache()
    result.update(device=jax.devices()[0].device_kind, jax=jax.__version__)
    measures = {
        'train': training.measure_train,
        'forward': training.measure_forward,
        'matmul': training.measure_matmul,
        'memory': decoding.measure_memory,
        'decode': decoding.measure_decode,
        'prefill': decoding.measure_prefill,
    }
    measures[cell.benchmark](cell, result)


def _out_of_memory(error: Exception) -> bool:
    return 'RESOURCE_EXHAUSTED' in str(error) or type(error).__name__ == 'OutOfMemoryError'


if __name__ == '__main__':
    main(sys.argv[1:])
