"""Prints how large scores, bias, weights and output of a gated model's layers are at the start of its training.

    python scripts/attention_sizes.py --config=configs/lm.py:model=flash,runlocal --steps=0,5,10
    python scripts/attention_sizes.py --config=FILE --config.FIELD=VALUE --steps=0,10,100 --json=FILE

Trains as train.py would, up to the last of the steps, and keeps nothing but these numbers: a table of layers for each
step. They are taken on the batch that the step is about to train on, with model.impl=xla.
"""

import _root  # noqa: F401
from absl import flags

from gau import cli, strict_json
from gau.errors import UserError

_STEPS = flags.DEFINE_list('steps', ['0', '10', '30', '100'], 'Steps at which to measure; 0 is before the first.')
flags.DEFINE_string('json', None, 'File to write a JSON line for each step to.')


def main() -> None:
    """Trains and prints."""
    if not all(step.isdecimal() for step in _STEPS.value) or not _STEPS.value:
        raise UserError(f'--steps={",".join(_STEPS.value)}: want whole numbers from 0 on')
    output, config = cli.output_file('json'), cli.load_config()
    if config.model.impl == 'auto':
        config.model.impl = 'xla'
    from gau.experiments import attention_sizes
    from gau.training.setup import Run

    attention_sizes.check(config)
    steps = sorted({int(step) for step in _STEPS.value})
    lines = []
    for step, loss, sizes in attention_sizes.while_training(Run.from_config(config), steps):
        print(f'\nstep {step}, loss {loss:.3f}\n\n{_table(sizes)}', flush=True)
        lines.append({'step': step, 'loss': loss, **{name: sizes[name].tolist() for name in sizes}})
    print('\n' + '\n'.join(f'{name}: {meaning}' for name, meaning in attention_sizes.SIZES.items()))
    if output:
        output.write_text(''.join(strict_json.dumps(line) + '\n' for line in lines))


def _table(sizes: dict) -> str:
    names = list(sizes)
    rows = [f'{"layer":>5}' + ''.join(f'{name:>12}' for name in names)]
    for layer in range(len(sizes[names[0]])):
        rows.append(f'{layer:>5}' + ''.join(f'{float(sizes[name][layer]):>12.3g}' for name in names))
    return '\n'.join(rows)


if __name__ == '__main__':
    cli.define_config()
    cli.run(main)
