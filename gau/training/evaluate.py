"""Evaluation of a work directory: any checkpoint, split, context length and text, with the evaluators of training."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from gau import lookup, strict_json
from gau.errors import UserError, did_you_mean
from gau.evaluation.evaluator import Case, Evaluator, Metrics
from gau.training import distributed
from gau.training import workdir as files
from gau.training.config import default_config
from gau.training.load import load_run, with_changes

Measured = dict[Evaluator, dict[Case, Metrics]]


def evaluate(
    workdir: str | Path,
    *,
    step: int | None = None,
    evaluators: Sequence[str] | None = None,
    contexts: Sequence[int] | None = None,
    splits: Sequence[str] | None = None,
    max_tokens: int | None = None,
    config: ConfigDict | None = None,
    changed: Mapping[str, Any] | None = None,
) -> Measured:
    """Evaluates a checkpoint, prints tables, appends to DIR/eval.jsonl and draws figures into DIR/plots/.

    With several processes all of them call it, and the first prints and writes.

    Args:
      workdir: directory of a run.
      step: checkpoint to load; None means the newest.
      evaluators: names of the config's entries, or types that need no entry, with whole numbers for fields behind them
        (`perplexity_in_chunk:chunk=128`); None means all entries.
      contexts: context lengths; None means the config's `data.context`.
      splits: data splits; None means the config's.
      max_tokens: tokens of each split to use; None means the config's.
      config: the run's config with other fields of `data`, `eval`, `evaluators`; None means as it is.
      changed: with `config`, the fields that were changed and their values, by path; also written into DIR/eval.jsonl.

    Raises:
      UserError: see `load_run`, `with_changes` and the evaluators; an unknown evaluator or split, a context that one
        of the evaluators cannot use.
    """
    workdir = Path(workdir)
    with distributed.together():
        changed = changed or {}
        config = with_changes(files.read_config(workdir) if config is None else config, changed)
        told = _choose(config, evaluators)
        for path in changed:
            if path.startswith('evaluators.') and path.split('.')[1] not in config.evaluators:
                raise UserError(f'--config.{path} does nothing: --evaluators={",".join(evaluators)} leaves it out')
        _set_for_all(config, changed, splits=None if splits is None else tuple(splits), max_tokens=max_tokens)
        run, params, step = load_run(workdir, step=step, config=config)
        measured: Measured = {evaluator: {} for evaluator in run.evaluators()}
        for evaluator in measured:
            Evaluator.check(evaluator)
            for context in contexts or [run.config.data.context]:
                evaluator.check_context(context)
    first = distributed.is_first()
    if first:
        model, data = run.config.model, run.config.data
        own = {split: data[f'{split}_source'] for split in ('valid', 'test')}
        held_out = ''.join(f', {split} is {source}' for split, source in own.items() if source)
        print(f'{workdir} at step {step}: {model.name} ({model.size}), {data.source}{held_out}, {data.tokenizer}')
    with run.context():
        for evaluator, cases in measured.items():
            for case in evaluator.cases(contexts or [run.config.data.context]):
                cases[case] = dict(evaluator.measure(params, case))
            if first:
                print(f'\n{evaluator.table(cases)}')
    if first:
        _write(workdir, step, measured, dict(changed), told)
    return measured


def _choose(config: ConfigDict, evaluators: Sequence[str] | None) -> dict[str, dict[str, int]]:
    """Leaves only the chosen entries in the config, in place; a type that no entry is named after becomes one.

    Returns:
      The fields that were given with each name.
    """
    if evaluators is None:
        return {}
    if not evaluators:
        raise UserError('--evaluators= names none: leave it out for all of the config')
    entries, types, told = config.evaluators, lookup.names('evaluation'), {}
    for given in evaluators:
        name, *fields = given.split(':')
        if name not in entries and name not in types:
            raise UserError(f'--evaluators: unknown "{name}"{did_you_mean(name, {*entries, *types})}')
        if name in told:
            raise UserError(f'--evaluators: "{name}" is there twice')
        told[name] = _fields(given, fields, entries.get(name) or {'type': name})
    with config.unlocked():
        chosen = {name: {**(entries.get(name) or {'type': name}), **fields} for name, fields in told.items()}
        config.evaluators = ConfigDict(chosen)
    return told


def _set_for_all(config: ConfigDict, changed: Mapping[str, Any], **flags: Any) -> None:
    """Sets fields of `eval`, and of every entry that has its own value, in place; a flag of None changes nothing.

    Raises:
      UserError: a flag whose field the command line changes as well, as --config.eval.FIELD.
    """
    for field, value in flags.items():
        if value is None:
            continue
        if f'eval.{field}' in changed:
            raise UserError(f'--{field} and --config.eval.{field} are the same: give one of them')
        config.eval[field] = value
        for entry in config.evaluators.values():
            if field in entry:
                entry[field] = value


def _fields(given: str, texts: Sequence[str], entry: Mapping[str, Any]) -> dict[str, int]:
    """Returns the fields that stand behind a name, `texts`; those that nobody knows the evaluator refuses."""
    if not texts:
        return {}
    shared, own = default_config().eval, lookup.find('--evaluators', entry['type'], 'evaluation').options
    kinds = {'type': str} | {field: shared.get_type(field) for field in shared}
    kinds |= {field: type(default) for field, default in own.items()}
    fields = {}
    for text in texts:
        field, _, value = text.partition('=')
        if field in fields:
            raise UserError(f'--evaluators={given}: "{field}" is there twice')
        if kinds.get(field, int) is not int:
            raise UserError(f'--evaluators={given}: "{field}" is not a whole number, as a field here must be')
        try:
            fields[field] = int(value)
        except ValueError:
            raise UserError(f'--evaluators={given}: want NAME:FIELD=NUMBER, as perplexity_in_chunk:chunk=128') from None
    return fields


def _write(
    workdir: Path, step: int, measured: Measured, changed: Mapping[str, Any], told: Mapping[str, Mapping[str, int]]
) -> None:
    """Writes rows and figures; what cannot be written is said in one line, since the tables have been printed."""
    written = []
    try:
        path = workdir / files.EVAL
        files.end_last_line(path)
        with path.open('a') as file:
            for evaluator, cases in measured.items():
                fields = told.get(evaluator.name, {})
                # Which text it was is told where it is not the run's own.
                other = {**changed, **{f'evaluators.{evaluator.name}.{name}': x for name, x in fields.items()}}
                for case, metrics in cases.items():
                    row = {'step': step, 'split': f'{evaluator.name}/{case.split}', **metrics}
                    file.write(strict_json.dumps(row | ({'config': other} if other else {})) + '\n')
        written.append(path)
        for evaluator, cases in measured.items():
            if evaluator.figure:
                path = workdir / 'plots' / f'{evaluator.figure_name}_step_{step}.png'
                evaluator.draw(cases, path, title=f'{workdir.name} at step {step}')
                written.append(path)
    except OSError as error:
        kept = 'the rest is what is printed above' if written else 'nothing is kept but what is printed above'
        print(f'warning: {path} cannot be written ({error.strerror or error}): {kept}', file=sys.stderr)
    if written:
        print('\nwritten: ' + ', '.join(map(str, written)))
