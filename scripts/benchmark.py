"""Measures speed and memory on this machine: JSON lines, a table, a picture.

    python scripts/benchmark.py                         base size, contexts 1 k to 128 k, batch 1 and 64: for a GPU
    python scripts/benchmark.py --quick                 tiny models, a minute on a CPU
    python scripts/benchmark.py --what=prefill --models=flash --contexts=16384,131072

`decode` writes tokens one by one, each looking back on `context` tokens; `prefill` reads a prompt of that length. What
does not fit into the device's memory is a row that says so.
"""

import datetime
import json
import subprocess
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError, did_you_mean

_WHAT = flags.DEFINE_list('what', ['decode', 'prefill'], 'Kinds of measurement: decode, prefill.')
_MODELS = flags.DEFINE_list('models', ['flash', 'transformer_plus_plus', 'flash_quad'], 'Models, comma separated.')
_SIZE = flags.DEFINE_string('size', None, 'Their size: tiny, small, base or large; base, or tiny with --quick.')
_CONTEXTS = flags.DEFINE_list('contexts', None, 'Tokens of context, comma separated.')
_BATCHES = flags.DEFINE_list('batch_sizes', None, 'Texts side by side, comma separated; 1 and 64, or 4.')
_QUICK = flags.DEFINE_boolean('quick', False, 'Small enough for a minute on a CPU.')
_OUTPUT = flags.DEFINE_string(
    'output', 'runs/benchmark/decoding.jsonl', 'File of JSON lines; the picture lies beside it.'
)


def main() -> None:
    """Measures, writing every row when it is there."""
    from gau.benchmarks import decoding, report
    from gau.models.architectures import ARCHITECTURES, SIZES

    for flag, values, options in (('what', _WHAT.value, decoding.KINDS), ('models', _MODELS.value, ARCHITECTURES)):
        for value in values:
            if value not in options:
                raise UserError(f'--{flag}: "{value}" does not exist{did_you_mean(value, options)}')
    if _SIZE.value is not None and _SIZE.value not in SIZES:
        raise UserError(f'--size={_SIZE.value} does not exist{did_you_mean(_SIZE.value, SIZES)}')
    contexts = cli.parse_positive_integers('contexts', _CONTEXTS.value)
    batch_sizes = cli.parse_positive_integers('batch_sizes', _BATCHES.value)
    chosen = {'contexts': contexts, 'batch_sizes': batch_sizes, 'size': _SIZE.value}
    quick = {
        'size': 'tiny',
        'dtype': 'float32',
        'contexts': (512, 2048),
        'batch_sizes': (4,),
        'steps': 16,
        'repeats': 3,
        'vocab_size': 1000,
        'block': 512,
    }
    fields = (quick if _QUICK.value else {}) | {name: value for name, value in chosen.items() if value is not None}
    plan = decoding.Plan(_MODELS.value, **fields)
    output, rows, about = Path(_OUTPUT.value), [], _about()
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open('w') as file:
        for kind in _WHAT.value:
            for row in decoding.KINDS[kind](plan):
                rows.append(row | about)
                file.write(json.dumps(rows[-1]) + '\n')
                file.flush()
                print(report.table(rows[-1:]).splitlines()[1], flush=True)
    picture = output.with_suffix('.png')
    report.plot(rows, picture)
    print(f'\n{about["device"]}, jax {about["jax"]}, commit {about["commit"]}\n{report.table(rows)}')
    print(f'written: {output}, {picture}')


def _about() -> dict[str, str]:
    import jax

    commit = subprocess.run(
        ['git', 'rev-parse', '--short', 'HEAD'], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return {
        'device': jax.devices()[0].device_kind,
        'jax': jax.__version__,
        'commit': commit.stdout.strip() or 'unknown',
        'date': datetime.date.today().isoformat(),
    }


if __name__ == '__main__':
    cli.run(main)
