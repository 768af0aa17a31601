"""Makes a trained model smaller, as a work directory that is evaluated, sampled, exported and trained on as any other.

    python scripts/compress.py --workdir=DIR --output=OUT --method=narrower --expansion_factor=1.5
    python scripts/compress.py --workdir=DIR --output=OUT --method=sparser --pattern=2:4
    python scripts/compress.py --workdir=DIR --output=OUT --method=rounded

narrower: E of the gated units, 2 D by default, becomes less. sparser: the smallest weights become zero, a share of each
kernel (--pattern=0.5) or two of every four. rounded: weights of 8 bits, by qwix (requirements-compress.txt).
A run with --init_from=OUT recovers what was lost; optimizer.keep_zeros keeps the zeros (docs/deploy.md).
"""

import functools

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError, check_name

flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
flags.DEFINE_string('output', None, 'Directory to make.', required=True)
flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.')
flags.DEFINE_string('method', None, 'narrower, sparser or rounded.', required=True)
flags.DEFINE_float('expansion_factor', None, 'E / D afterwards, for narrower.')
flags.DEFINE_string('pattern', None, 'A share of the weights, such as 0.5, or 2:4, for sparser.')

# What each method needs besides the model.
METHODS = {'narrower': 'expansion_factor', 'sparser': 'pattern', 'rounded': None}


def main() -> None:
    """Compresses, and says what came of it."""
    values = flags.FLAGS
    check_name('--method', values.method, tuple(METHODS))
    needed = METHODS[values.method]
    options = {}
    for option in filter(None, METHODS.values()):
        value = values[option].value
        if (option == needed) != (value is not None):
            does = 'needs' if option == needed else 'does nothing with'
            raise UserError(f'--method={values.method} {does} --{option}')
        if value is not None:
            options[option] = value
    # Imported late: this imports JAX.
    from gau import compression

    method = functools.partial(getattr(compression, values.method), **options)
    report = compression.compress(values.workdir, values.output, method, step=values.step)
    print(f'{values.output}: ' + ', '.join(f'{name} {value}' for name, value in report.items()))


if __name__ == '__main__':
    cli.run(main)
