"""Finished runs as records: what a report needs of a work directory, and the JSON lines in which it is kept."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from gau import strict_json
from gau.data import config as data_config
from gau.data.passes import Passes
from gau.errors import UserError
from gau.experiments.cost import tokens_per_step
from gau.experiments.directory import KEPT_RUNS, SWEEP, read_points, read_starts
from gau.models.fields import GONE
from gau.training import workdir as files
from gau.training.config import RESUMABLE_CHANGES, flatten, unflatten

# Points of a curve that are kept of a run.
CURVE_POINTS = 60
# How the name of a curve begins that is not over tokens of training, but over where a target stands.
BY_RANGE = 'loss_by_'
# Ending of a file of kept runs.
KEPT = '.jsonl'
# What does not decide what a run computes: how it is stored, looked at, and spread over devices.
_NOT_MEANT = (*RESUMABLE_CHANGES, 'checkpoint.', 'eval.', 'evaluators.')


class Run(NamedTuple):
    """A finished run.

    Attributes:
      name: of its directory.
      label: the name without the seed; of a run outside of a sweep the same as the name.
      swept: fields of the config that its sweep set, without the seed; None outside of a sweep, or where the sweep set
        arguments of the program, which are no fields.
      config: by dotted field.
      metrics: by split, as in final.json.
      curves: by split ('train' and the evaluated ones), rows (tokens, seconds of training, loss); of what eval.py
        measured, by metric (`loss_by_place`), rows (middle of a range, its targets, loss).
      facts: command, commits, device, versions, data (what each source holds), tokenizer (fingerprint), tokens,
        parameters, flops_per_token, tokens_per_second, per_device (runs that shared its device, at most; not of runs
        kept before that was noted), passes (how often training passed over each source, as text; only where a manifest
        says how large it is, and not of runs before that was noted).
    """

    name: str
    label: str
    swept: list[str] | None
    config: dict[str, Any]
    metrics: dict[str, dict[str, float | None]]
    curves: dict[str, list[list[float]]]
    facts: dict[str, Any]

    @property
    def seed(self) -> int:
        """Of parameters, order of the data, dropout."""
        return self.config['seed']

    def meant(self) -> dict[str, Any]:
        """Returns the fields that decide what the run computes, but for the seed.

        One that is gone counts as it would stand in this config if it were not: what is meant did not change with that.
        """
        model = {path.removeprefix('model.'): v for path, v in self.config.items() if path.startswith('model.')}
        gone = {f'model.{name}': was.stood(model) for name, was in GONE.items() if was.beside in model}
        fields = {**gone, **self.config}
        return {path: v for path, v in fields.items() if path != 'seed' and not path.startswith(_NOT_MEANT)}

    def config_hash(self) -> str:
        """Returns a short hash of these fields: the same for all seeds."""
        return hashlib.sha256(json.dumps(self.meant(), sort_keys=True).encode()).hexdigest()[:8]


def find(paths: Sequence[Path]) -> tuple[list[Run], dict[str, int | None]]:
    """Returns the finished runs in work directories, directories of sweeps and files of kept runs, and the others.

    Those are given by name, with the step at which one diverged, or None: it is not finished.

    Files may overlap, as those kept of a sweep that has grown since do: a run that several hold counts once, whatever
    they call it. What a sweep took from elsewhere (its kept.jsonl) counts where it has not run the point itself.

    Raises:
      UserError: a directory holds neither a run nor a sweep, a file cannot be read, or one of them is given twice.
    """
    runs: dict[str, Run] = {}
    others, seen = {}, set()
    for path in paths:
        if path.suffix == KEPT:
            workdirs, own = [path], [_renewed(run) for run in load(path)[0]]
        else:
            workdirs = _workdirs(path)
            finished = [workdir for workdir in workdirs if files.read_final(workdir) is not None]
            own = [read(workdir) for workdir in finished]
            done = {workdir.name for workdir in finished}
            taken = [run for run in _taken(path) if run.name not in done]
            own += taken
            done |= {run.name for run in taken}
            others |= {one.name: files.read_diverged(one) for one in workdirs if one.name not in done}
        for workdir in workdirs:
            if workdir.resolve() in seen:
                raise UserError(f'{workdir} is given twice')
            seen.add(workdir.resolve())
        runs |= {json.dumps([run.config, run.metrics], sort_keys=True): run for run in own}
    return list(runs.values()), others


def left_out(others: Mapping[str, int | None]) -> str:
    """Returns in words the runs that a report does not have, as `find` gives them; '' if there are none."""
    unfinished = ', '.join(name for name, step in others.items() if step is None)
    diverged = ', '.join(f'{name} at step {step:,}' for name, step in others.items() if step is not None)
    told = {'not finished': unfinished, 'diverged': diverged}
    return '; '.join(f'{what}: {names}' for what, names in told.items() if names)


def _workdirs(directory: Path) -> list[Path]:
    workdirs = [directory] if (directory / files.CONFIG).is_file() else []
    if (directory / SWEEP).is_file():
        workdirs = [directory / name for name in read_points(directory)]
    elif not workdirs and directory.is_dir():
        workdirs = sorted(path.parent for path in directory.glob(f'*/{files.CONFIG}'))
    if not workdirs:
        raise UserError(f'{directory} holds neither a run nor a sweep')
    return workdirs


def _taken(sweep: Path) -> list[Run]:
    """Returns the runs that a sweep took from elsewhere."""
    path = sweep / KEPT_RUNS
    if not path.is_file() or not path.stat().st_size:
        return []
    return [_renewed(run) for run in load(path)[0]]


def _renewed(run: Run) -> Run:
    """Returns a kept run with the fields that configs have got since at their defaults, as work directories do."""
    return run._replace(config=flat(files.whole_config(unflatten(run.config))))


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns a config by dotted field, without the places of files."""
    return {path: without_place(value) for path, value in flatten(files.config_to_dict(config)).items()}


def read(workdir: Path) -> Run:
    """Returns the record of a finished run.

    Raises:
      UserError: there is none in the directory, or it has no result or no metrics.
    """
    config = files.read_config(workdir)
    final = files.read_final(workdir)
    if final is None:
        raise UserError(f'{workdir} has no result: {files.FINAL} is missing or damaged')
    lines = files.read_metrics(workdir / files.METRICS)
    if not any(line['split'] == 'train' for line in lines):
        raise UserError(f'{workdir / files.METRICS} has no line of training that can be read')
    rows = pd.DataFrame(lines)
    point, attempts = _of_sweep(workdir)
    overrides = point.get('overrides', {})
    identities = dict(final.get('data') or _data_of_checkpoint(workdir))
    train = rows[rows['split'] == 'train']
    facts = {
        'command': _command(attempts[-1]['command']) if attempts else None,
        'commits': sorted({_short(attempt['commit']) for attempt in attempts if attempt['commit']}),
        'device': final['device'],
        'versions': final['versions'],
        'tokenizer': identities.pop('tokenizer', None),
        'data': {without_place(name): held for name, held in (_contents(workdir, config) or identities).items()},
        'tokens': final['step'] * tokens_per_step(config),
        'parameters': final['parameters'],
        'flops_per_token': final['flops_per_token'],
        'tokens_per_second': _median(train.get('tokens_per_second')),
        'per_device': max((attempt.get('per_device', 1) for attempt in attempts), default=1),
    }
    if final.get('passes'):
        facts['passes'] = {without_place(source): str(Passes(**found)) for source, found in final['passes'].items()}
    return Run(
        name=workdir.resolve().name,
        label=point.get('label', workdir.resolve().name),
        swept=swept_fields(overrides) if point else None,
        config=flat(config),
        metrics=final['eval'],
        curves=_curves(rows, tokens_per_step(config)),
        facts=facts,
    )


def swept_fields(overrides: Iterable[str]) -> list[str] | None:
    """Returns the fields that a sweep set, without the seed; None where it set arguments of the program."""
    fields = [path for path in overrides if path != 'seed']
    return None if any(path.startswith(':') for path in fields) else fields


def dump(runs: Sequence[Run], header: dict[str, Any]) -> str:
    """Returns JSON lines: the header with the fields that all configs share, then a line a run.

    Raises:
      UserError: there is no run.
    """
    if not runs:
        raise UserError('no finished run to keep')
    first = runs[0].config
    common = {path: value for path, value in first.items() if all(run.config.get(path) == value for run in runs)}
    lines = [{**header, 'config': common}]
    for run in runs:
        own = {path: value for path, value in run.config.items() if path not in common}
        lines.append(run._replace(config=own)._asdict())
    return ''.join(strict_json.dumps(line) + '\n' for line in lines)


def load(path: Path) -> tuple[list[Run], dict[str, Any]]:
    """Returns the runs and the header of kept JSON lines.

    Raises:
      UserError: it cannot be read.
    """
    try:
        header, *lines = [strict_json.loads(line) for line in path.read_text().splitlines()]
        common = header.pop('config')
        return [Run(**{**line, 'config': {**common, **line['config']}}) for line in lines], header
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path} cannot be read as the kept runs of a table: {error}') from error


def without_place(value: Any) -> Any:
    """Returns a text with file names in place of absolute paths, and anything else as it is.

    Where the files of a run lay on its machine decides nothing; the data's identity is kept beside it.
    """
    return re.sub(r'(^|[:=,\s])/(?:[^/\s,:=]+/)+', r'\1', value) if isinstance(value, str) else value


def _command(command: str) -> str:
    return ' '.join(without_place(part) for part in command.split() if not part.startswith('--workdir='))


def _of_sweep(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns what the sweep's directory says of the point: its entry in sweep.json, and how often it was started."""
    sweep = workdir.resolve().parent
    if not (sweep / SWEEP).is_file():
        return {}, []
    name = workdir.resolve().name
    point = read_points(sweep).get(name, {})
    return point, [line for line in read_starts(sweep) if line['point'] == name]


def _short(commit: str) -> str:
    return re.sub(r'\b([0-9a-f]{10})[0-9a-f]{30}\b', r'\1', commit)


def _contents(workdir: Path, config: ConfigDict) -> dict[str, str]:
    """Returns what each source of the run holds, which is the same however often it was prepared; {} of older runs."""
    if not (workdir / files.DATA).is_file():
        return {}
    lines = [line.partition(' ') for line in files.read_json(workdir / files.DATA)['contents']]
    training = iter(data_config.sources(config.data))
    names = {kind: config.data[kind] for kind in ('valid_source', 'test_source')}
    return {
        next(training) if kind == 'source' else names[kind]: held
        for kind, _, held in lines
        if kind == 'source' or kind in names
    }


def _data_of_checkpoint(workdir: Path) -> dict[str, str]:
    """Returns the data's identity where final.json does not have it yet: it lies in the checkpoints, too."""
    for path in sorted(workdir.glob('checkpoints/*/meta/metadata')):
        return json.loads(path.read_text()).get('data', {})
    return {}


def _curves(rows: pd.DataFrame, step_tokens: int) -> dict[str, list[list[float]]]:
    """Returns rows (tokens, seconds of training, loss) by split; training is the mean loss over equal spans."""
    train = rows[rows['split'] == 'train']
    # The first line has no speed, for its step compiles: the next one's stands in.
    speed = train['step_seconds'].astype(float).bfill().fillna(0.0)
    seconds = (np.diff(train['step'], prepend=0) * speed).cumsum()
    curves = {}
    for split, own in rows.groupby('split'):
        own = own[own['loss'].notna()]
        if split == 'train':
            # The last line of a span says where it ends.
            span = np.arange(len(own)) * CURVE_POINTS // max(len(own), CURVE_POINTS)
            own = own.assign(loss=own.groupby(span)['loss'].transform('mean')).groupby(span).last()
        at = np.interp(own['step'], train['step'], seconds)
        curves[split.removeprefix('eval/')] = [
            [int(step) * step_tokens, round(float(second), 3), round(float(loss), 6)]
            for step, second, loss in zip(own['step'], at, own['loss'], strict=True)
        ]
    return curves


def _median(values: pd.Series | None) -> float | None:
    if values is None or values.dropna().empty:
        return None
    return round(float(values.median()), 1)


def differing(runs: Iterable[Run]) -> list[str]:
    """Returns the fields, of those that decide what is computed, in which runs differ; the seed is none of them."""
    configs = [run.meant() for run in runs]
    paths = sorted(set().union(*configs))
    return [path for path in paths if any(config.get(path) != configs[0].get(path) for config in configs)]
