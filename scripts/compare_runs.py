"""Sets runs side by side: a picture of their losses, and how far each is from the first.

    python scripts/compare_runs.py --workdirs=runs/a,runs/b --output=compared.png
    python scripts/compare_runs.py --workdirs=runs/a,runs/b --split=valid --output=compared.png

A run is called by the last part of its directory's name. It may still be going on.
"""

from pathlib import Path

import _root  # noqa: F401
import numpy as np
from absl import flags

from gau import cli, plots
from gau.errors import UserError
from gau.training.workdir import METRICS, read_metrics

_WORKDIRS = flags.DEFINE_list('workdirs', None, 'Directories of the runs, comma separated.', required=True)
_SPLIT = flags.DEFINE_string('split', 'train', 'train, or an evaluated split: valid, or EVALUATOR/SPLIT.')
flags.DEFINE_string('output', None, 'The PNG to write.', required=True)


def main() -> None:
    """Prints the table and writes the picture."""
    output = cli.output_file('output')
    if not _WORKDIRS.value or output is None:
        raise UserError('--workdirs and --output must name something')
    losses: dict[str, dict[int, float]] = {}
    for workdir in map(Path, _WORKDIRS.value):
        name = workdir.resolve().name
        if name in losses:
            raise UserError(f'--workdirs: two runs are called {name}')
        losses[name] = _losses(workdir / METRICS, _SPLIT.value)
    plots.plot_runs(losses, output, title=f'{_SPLIT.value} loss')
    first = next(iter(losses.values()))
    width = max(map(len, losses))
    print(f'{"run":{width}} {"steps":>9} {"last loss":>10} {"mean difference":>16} {"largest":>9}   from the first')
    for name, curve in losses.items():
        differences = [abs(curve[step] - first[step]) for step in curve if step in first]
        distance = f'{np.mean(differences):16.4f} {np.max(differences):9.4f}' if differences else f'{"-":>16}'
        last = max(curve)
        print(f'{name:{width}} {last:9,} {curve[last]:10.4f} {distance}')
    print(f'written: {output}')


def _losses(path: Path, split: str) -> dict[int, float]:
    """Returns the loss by step of one split, named as in final.json: `valid`, or EVALUATOR/SPLIT.

    Raises:
      UserError: there is no such file, or no loss of the split in it.
    """
    if not path.is_file():
        raise UserError(f'--workdirs: {path} does not exist')
    rows = read_metrics(path)
    rows = [row | {'split': row['split'].removeprefix('eval/')} for row in rows if row.get('loss') is not None]
    losses = {row['step']: row['loss'] for row in rows if row['split'] == split.removeprefix('eval/')}
    if not losses:
        splits = sorted({row['split'] for row in rows})
        raise UserError(f'--split={split}: {path} has {", ".join(splits) or "no losses yet"}')
    return losses


if __name__ == '__main__':
    cli.run(main)
