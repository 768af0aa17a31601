"""Makes one table of finished runs: Markdown, CSV, kept JSON lines and figures.

    python scripts/report.py runs/chunks                                       rows: what the sweep set, over its seeds
    python scripts/report.py runs/a runs/b --by=model.name --against=transformer_plus_plus --output=docs/results/models
    python scripts/report.py runs/chunks --output=day_1.jsonl                  keep the runs in one file, for later
    python scripts/report.py day_1.jsonl day_2.jsonl --output=docs/results/chunks
    python scripts/report.py --evaluations runs/a runs/a_int8 --by=point       what eval.py measured of each directory
    python scripts/report.py --check                                           every table in docs/results
    python scripts/report.py --renew                                           those that --check finds to be others

Arguments are directories of runs and of sweeps, and files of kept runs, which this command wrote. Together they are one
table, whatever machine and day the runs come from. Without --output the files are DIR/report.*. --check makes the
tables again from the kept JSON lines beside them, and ends with 1 if one differs.
"""

import sys
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli, outputs
from gau.errors import UserError

_BY = flags.DEFINE_list(
    'by',
    [],
    "Fields of the config whose values make the rows, point for a point's name, family and attention for the model's "
    'records; default: what the sweep set.',
)
_AGAINST = flags.DEFINE_string('against', None, 'Row to compare with: a value of the first field, or FIELD=VALUE,...')
_BEST = flags.DEFINE_string('best', None, 'Field of which each row takes the best value, such as the learning rate.')
_SPLIT = flags.DEFINE_string('split', 'valid', 'Evaluated split that the table is about.')
_METRIC = flags.DEFINE_string('metric', 'loss', 'What of it, as in final.json.')
_ALLOW = flags.DEFINE_list('allow', [], 'What may differ between the runs: data, tokens.')
_TITLE = flags.DEFINE_string('title', None, 'Title of the page and the figures; default: the name of the output.')
_OUTPUT = flags.DEFINE_string(
    'output',
    None,
    'Path without ending: .md, .jsonl, .csv and _*.png are written; with .jsonl: only the runs.',
)
_EVALUATIONS = flags.DEFINE_boolean('evaluations', False, 'Rows are what eval.py measured, not the ends of training.')
_CHECK = flags.DEFINE_boolean('check', False, 'Compare tables with what their kept JSON lines give; write nothing.')
_RENEW = flags.DEFINE_boolean('renew', False, 'Make those tables again that are not what their kept JSON lines give.')

RESULTS = Path(__file__).resolve().parents[1] / 'docs' / 'results'


def main(arguments: list[str]) -> int:
    """Reports, or checks."""
    if _CHECK.value or _RENEW.value:
        cli.refuse(
            *('by', 'against', 'best', 'split', 'metric', 'allow', 'title', 'output', 'evaluations'),
            beside='check' if _CHECK.value else 'renew',
            because='a kept table knows how it was made',
        )
        if _CHECK.value:
            cli.refuse('renew', beside='check', because='it writes nothing')
        kept = [Path(argument) for argument in arguments] or sorted(RESULTS.glob('*.jsonl'))
        return _check(kept) if _CHECK.value else _renew(kept)
    if not arguments:
        raise UserError('no directory is given: python scripts/report.py DIR...')
    from gau.experiments import publish, runs
    from gau.experiments.report import Options, kept_paths, make

    paths = [Path(argument) for argument in arguments]
    if not _OUTPUT.value and paths[0].suffix == runs.KEPT:
        raise UserError(f'{paths[0]} is a file of kept runs: --output=PATH must say where their table goes')
    if _EVALUATIONS.value:
        from gau.experiments import evaluated

        found, others = evaluated.find(paths, split=_SPLIT.value), {}
    else:
        found, others = runs.find(paths)
    left_out = runs.left_out(others)
    if not found:
        raise UserError(f'no finished run to report{"; " * bool(left_out)}{left_out}')
    if left_out:
        print(f'left out, {left_out}', file=sys.stderr)
    stem = Path(_OUTPUT.value) if _OUTPUT.value else paths[0] / 'report'
    outputs.check_file(stem if stem.suffix == runs.KEPT else kept_paths(stem)['md'], flag='output')
    if stem.suffix == runs.KEPT:
        own = ('by', 'against', 'best', 'metric', 'allow', 'title', *(() if _EVALUATIONS.value else ('split',)))
        cli.refuse(*own, beside=f'output={stem}', because='runs are kept without a table')
        print(publish.keep(found, stem))
        return 0
    title = _TITLE.value or (stem.name if _OUTPUT.value else paths[0].resolve().name)
    options = Options(
        tuple(_BY.value), _AGAINST.value, _BEST.value, _SPLIT.value, _METRIC.value, tuple(_ALLOW.value), title
    )
    print(publish.write(make(found, options), found, stem))
    return 0


def _check(paths: list[Path]) -> int:
    from gau.experiments import publish

    code = 0
    for path in paths:
        verdict = publish.check(path)
        print(f'{path}: {verdict}')
        code = code or int(verdict != publish.SAME)
    return code


def _renew(paths: list[Path]) -> int:
    from gau.experiments import publish

    for path in paths:
        print(f'{path}: {publish.renew(path)}', flush=True)
    return 0


if __name__ == '__main__':
    cli.run(main, arguments=True)
