"""Prints the effective rank of attention A, of A V and of U * (A V) in every layer of trained models.

    python scripts/attention_ranks.py runs/heads/gau runs/heads/gau_8_heads --sequences=8 --plot=ranks.png
    python scripts/attention_ranks.py runs/heads/gau --split=test --json=FILE.jsonl
    python scripts/attention_ranks.py FILE.jsonl --plot=ranks.png

Reads the newest checkpoint of each work directory on the first held-out sequences of its own context, in float32 and
without kernels; of a file that --json wrote, what it holds. The rank is exp(entropy) of the singular values: k for k
equal ones. No matrix here has more than `tokens` of them, and AV and UAV no more than `width`.
"""

import itertools
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli, strict_json
from gau.errors import UserError

_SEQUENCES = flags.DEFINE_integer('sequences', 8, 'Held-out sequences, over which ranks are averaged.', lower_bound=1)
_SPLIT = flags.DEFINE_string('split', 'valid', 'Data split.')
flags.DEFINE_string('json', None, 'File to write a JSON line for each layer to.')
flags.DEFINE_string('plot', None, 'PNG to draw the ranks over the layers into.')


def main(arguments: list[str]) -> None:
    """Measures, or reads what was measured, and prints."""
    if not arguments:
        raise UserError('want work directories, or files that --json wrote: attention_ranks.py DIR [DIR...]')
    for name in ('sequences', 'split'):
        if flags.FLAGS[name].present and all(argument.endswith('.jsonl') for argument in arguments):
            raise UserError(f'--{name} does nothing without a work directory: files say what was measured')
    json_file, plot = cli.output_file('json'), cli.output_file('plot')
    from gau.experiments import attention_ranks

    lines, means = [], []
    for path in map(Path, arguments):
        found = attention_ranks.read(path) if path.suffix == '.jsonl' else _measure(path)
        for name in {line['workdir'] for line in found} & {line['workdir'] for line in lines}:
            raise UserError(f'two models are called {name}')
        lines += found
        for name, group in itertools.groupby(found, key=lambda line: line['workdir']):
            layers = list(group)
            step, model, gate, tokens, width = (layers[0][key] for key in ('step', 'model', 'gate', 'tokens', 'width'))
            print(f'\n{name} at step {step}: {model}, gate {gate}, {tokens} tokens, width {width}')
            shown = ('layer', 'heads', *attention_ranks.RANKS)
            print(f'\n{_table([{key: line[key] for key in shown} for line in layers])}', flush=True)
            means.append({'': name} | {x: sum(line[x] for line in layers) / len(layers) for x in attention_ranks.RANKS})
    print('\nMean over layers\n\n' + _table(means))
    print('\n' + '\n'.join(f'{name}: {meaning}' for name, meaning in attention_ranks.RANKS.items()))
    if json_file:
        json_file.write_text(''.join(strict_json.dumps(line) + '\n' for line in lines))
    if plot:
        attention_ranks.plot(lines, plot)


def _measure(workdir: Path) -> list[dict]:
    """Returns a line for each layer of a trained model."""
    from gau.experiments import attention_ranks
    from gau.training import workdir as files
    from gau.training.load import load_run

    run, params, step = load_run(workdir, config=attention_ranks.readable(files.read_config(workdir)))
    found, width = attention_ranks.ranks(run, params, split=_SPLIT.value, sequences=_SEQUENCES.value)
    model = run.config.model
    about = {'workdir': workdir.name, 'step': step, 'model': model.name, 'gate': model.gate}
    about |= {'tokens': run.config.data.context, 'width': width, 'sequences': _SEQUENCES.value}
    return [
        about | {'layer': layer, 'heads': model.num_heads} | {name: float(x[layer]) for name, x in found.items()}
        for layer in range(model.num_layers)
    ]


def _table(rows: list[dict]) -> str:
    cells = [list(rows[0]), *([_text(value) for value in row.values()] for row in rows)]
    widths = [max(8, *map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join(' '.join(f'{cell:>{width}}' for cell, width in zip(row, widths, strict=True)) for row in cells)


def _text(value: float | str) -> str:
    return f'{value:.1f}' if isinstance(value, float) else str(value)


if __name__ == '__main__':
    cli.run(main, arguments=True)
