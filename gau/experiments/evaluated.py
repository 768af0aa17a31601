"""What eval.py measured of models, as the runs of a table: as trained, with other fields, and made smaller."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gau.errors import UserError
from gau.experiments import runs
from gau.experiments.runs import Run
from gau.training import workdir as files


def find(workdirs: Sequence[Path], *, split: str = 'valid') -> list[Run]:
    """Returns a record for every directory of a run or of `scripts/compress.py`, and every setting it was measured in.

    A setting is what eval.py was told to change (`--config.quantization=int8`), or another length of context than the
    run's own; the last measurement of each metric counts, by whatever evaluator, of the newest checkpoint that was
    measured. Losses by ranges (`loss_by_place`) are curves. The label is that of the run, or the directory's name, with
    the setting.

    Args:
      workdirs: the directories.
      split: `valid`: of that split; `passkey/valid`: what this evaluator alone measured of it.

    Raises:
      UserError: a directory holds no measurement, or the model that one was made of is not beside it.
    """
    found = []
    for workdir in workdirs:
        run = _made_smaller(workdir) if (workdir / files.COMPRESSION).is_file() else runs.read(workdir)
        rows = files.read_metrics(workdir / files.EVAL)
        if not rows:
            raise UserError(f'{workdir} holds no measurement: python eval.py --workdir={workdir}')
        step = max(row['step'] for row in rows)
        settings: dict[str, tuple[dict, dict, dict]] = {}
        for row in rows:
            if row['step'] != step or 'context' not in row or ('/' in split and row['split'] != split):
                continue
            longer = {'data.context': row['context']} if row['context'] != run.config['data.context'] else {}
            changed = {**row.get('config', {}), **longer}
            told = ' '.join(f'{field.rpartition(".")[2]}={value}' for field, value in changed.items())
            _, metrics, curves = settings.setdefault(told, (changed, {}, {}))
            own = split if '/' in split else row['split'].partition('/')[2]
            numbers = {name: x for name, x in row.items() if isinstance(x, int | float) and name != 'step'}
            metrics.setdefault(own, {}).update(numbers)
            curves |= {name: _curve(x) for name, x in row.items() if name.startswith(runs.BY_RANGE)}
        found += [_measured(run, told, *setting) for told, setting in settings.items() if split in setting[1]]
    return found


def _curve(ranges: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """Returns rows (middle of a range, counted from 1; its targets; mean loss)."""
    return [[(x['first'] + x['last']) / 2 + 1, x['tokens'], x['loss']] for x in ranges]


def _measured(run: Run, told: str, changed: dict, metrics: dict, curves: dict) -> Run:
    # Another context is no change of the config: the model and its data stay.
    told_by = {field: 'contexts' if field == 'data.context' else f'config.{field}' for field in changed}
    arguments = [shlex.quote(f'--{told_by[field]}={runs.without_place(value)}') for field, value in changed.items()]
    command = run.facts['command'] if not told else ' '.join(['python eval.py', *arguments])
    return run._replace(
        label=runs.without_place(f'{run.label} {told}'.strip()),
        swept=None,
        config={**run.config, **{field: runs.without_place(value) for field, value in changed.items()}},
        metrics=metrics,
        curves=curves,
        facts={**run.facts, 'command': command, 'tokens_per_second': None},
    )


def _made_smaller(workdir: Path) -> Run:
    """Returns the record of the model that one was made of, with what was done to it."""
    done = files.read_json(workdir / files.COMPRESSION)
    source = Path(done['source'])
    if not source.is_dir():
        # The directories were moved together.
        source = workdir.parent / source.name
    if not source.is_dir():
        raise UserError(f'{workdir} was made of {source}, which is not there: its table needs both')
    trained, config = runs.read(source), runs.flat(files.read_config(workdir))
    options = [f'--{name}={done[name]}' for name in ('method', 'pattern') if name in done]
    if config['model.expansion_factor'] != trained.config['model.expansion_factor']:
        options.append(f'--expansion_factor={config["model.expansion_factor"]}')
    return trained._replace(
        name=workdir.resolve().name,
        label=workdir.resolve().name,
        config=config,
        facts={
            **trained.facts,
            'command': ' '.join(['python scripts/compress.py', *options]),
            'parameters': done['parameters']['after'],
        },
    )
