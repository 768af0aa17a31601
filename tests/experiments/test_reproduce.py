"""The paper's named experiments: every point of every budget is accepted, and one of them is made from nothing."""

import importlib
import os
import shlex
import subprocess
import sys

import pytest

from configs.paper import budgets
from gau.experiments import plan, publish, runs
from gau.experiments.report import LABEL, RECORDS, value_of
from gau.experiments.sweep import Program, find_points, literal
from gau.training.config import flatten
from tests.conftest import ROOT
from tests.programs import call

TABLES = sorted({path.stem for path in (ROOT / 'configs' / 'paper').glob('*.py')} - {'__init__', 'budgets'})


# What no budget leaves to the default of the day: a table is of the paper's unit, whatever is best by now.
UNIT = {
    'model.absolute_position': 'sinusoid',
    'model.key_input': 'shared',
    'model.decay_gate': 'none',
    'model.local_window': 1,
    'model.far_chunks': 0,
    'model.short_convolution': 0,
    'optimizer.name': 'adamw',
}
# Pages whose rows were measured with programs that are still here, and fields that are.
PAGES = [
    *('branches', 'models', 'compression_recovered', 'compression_students', 'quality_base', 'quality_causes'),
    *('quality_gate', 'quality_keys', 'quality_long', 'quality_muon', 'expansion', 'gau_ablation'),
]


def run(*arguments, cwd=ROOT):
    done = subprocess.run(
        [sys.executable, ROOT / 'scripts' / 'reproduce.py', *arguments],
        cwd=cwd,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=3000,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize('budget', budgets.BUDGETS)
@pytest.mark.parametrize('name', TABLES)
def test_every_point_is_accepted_and_has_its_row(name, budget):
    table = importlib.import_module(f'configs.paper.{name}').TABLE
    # The prepared data need not be here.
    program = Program(str(ROOT / 'configs' / 'paper' / f'{name}.py'), f'budget={budget},data=embedded')
    points = find_points(program, table.sweep(budget))
    assert [point.error for point in points if point.config is None] == []
    for point in points:
        flat = flatten(point.config.to_dict())
        assert {
            path: flat[path] for path in UNIT if path not in point.overrides and flat[path] is not None
        }.items() <= (UNIT.items())
    fields = flatten(points[0].config.to_dict())
    report = table.flags(budget)
    by = report['by'].split(',')
    assert all(field in fields or field in (LABEL, *RECORDS) for field in by)

    def row(point):
        finished = runs.Run(point.name, point.label, None, flatten(point.config.to_dict()), {}, {}, {})
        return tuple(str(value_of(finished, field)) for field in by)

    # A row holds nothing but the seeds of one setting.
    rows = {}
    for point in points:
        settings = point.config.copy_and_resolve_references()
        settings.seed = 0
        rows.setdefault(row(point), set()).add(settings.to_json())
    assert all(len(settings) == 1 for settings in rows.values())
    if 'against' in report:
        wanted = dict(part.split('=') if '=' in part else (by[0], part) for part in report['against'].split(','))
        # Every row has its baseline: a row of that value and the same values in all other fields.
        baselines = {tuple(wanted.get(field, value) for field, value in zip(by, found, strict=True)) for found in rows}
        assert baselines <= rows.keys()


@pytest.mark.parametrize('page', PAGES)
def test_a_row_is_what_its_command_gives_today(page):
    """A default that changed would leave the row and its command with two meanings."""
    kept, _ = runs.find([ROOT / 'docs' / 'results' / f'{page}.jsonl'])
    rows = {run.config_hash(): run for run in kept}
    for run in rows.values():
        _, _, config, *overrides = shlex.split(run.facts['command'])
        # The prepared data need not be here, and say what their tokenizer is.
        path, _, argument = config.removeprefix('--config=').partition(':')
        program = Program(str(ROOT / path), ','.join(filter(None, [argument, 'data=embedded'])))
        fields = dict(override.removeprefix('--config.').split('=', 1) for override in overrides)
        today = run._replace(config=runs.flat(program.config({name: literal(text) for name, text in fields.items()})))
        where = ('data.source', 'data.tokenizer', 'init_from')
        one, other = ({k: v for k, v in each.meant().items() if k not in where} for each in (today, run))
        assert one == other, run.name


def test_seeds_see_the_same_number_of_tokens_whatever_the_context():
    program = importlib.import_module('configs.paper.chunk_size')
    for budget, context, tokens in (
        ('small', 1024, 65_536),
        ('small', 8192, 65_536),
        ('tiny', 256, 512),
        ('tiny', 512, 512),
    ):
        assert program.get_config(f'budget={budget},context={context}').data.batch_size * context == tokens


BAD = {
    'no table': ([], 'want one table: branches, chunk_size'),
    'unknown table': (['branchs'], 'did you mean "branches"'),
    'unknown budget': (['branches', '--budget=large'], 'large'),
    'missing with an output': (['--missing', '--output=x'], '--output does nothing with --missing'),
    'kept runs with a source': (
        ['branches', '--only_kept', '--source=text:x'],
        '--source does nothing with --only_kept',
    ),
    'no data': (['branches', '--budget=small'], '--source=jsonl:GLOB'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_and_code_2(name):
    arguments, hint = BAD[name]
    if name == 'no data' and (ROOT / 'data' / 'wiki_en').exists():
        pytest.skip('the data are there')
    code, _, err = call('scripts/reproduce.py', *arguments)
    assert (code, err.count('\n')) == (2, 1), err
    assert hint in err


def test_a_dry_run_needs_no_data(monkeypatch, started):
    monkeypatch.chdir(ROOT)
    code, _, err = call('scripts/reproduce.py', 'branches', '--budget=paper', '--dry_run')
    assert code == 0, err
    (sweep,) = started
    path, _, argument = sweep[2].removeprefix('--config=').partition(':')
    points = find_points(Program(path, argument), sweep[3].removeprefix('--sweep='))
    assert not any(point.error for point in points)
    table = plan.costs(points, chip='H100', utilisation=0.4, vocab_size=int(sweep[4].removeprefix('--vocab_size=')))
    assert '112,' in table  # millions of parameters, with the vocabulary that the data would have


def test_it_works_from_any_directory(tmp_path):
    code, out, err = run('seeds', '--dry_run', cwd=tmp_path)
    assert code == 0, err
    assert 'hours on one H100' in out


@pytest.mark.slow
def test_a_table_is_made_from_nothing(tmp_path):
    stem = tmp_path / 'tables' / 'branches'
    code, out, err = run('branches', '--budget=tiny', f'--workdir={tmp_path / "runs"}', f'--output={stem}')
    assert code == 0, out + err
    page = stem.with_suffix('.md').read_text()
    assert page.startswith('# Branches of mixed chunk attention\n')
    for branches in ('both', 'local', 'global'):
        assert f'| {branches} ' in page
    assert 'baseline' in page
    assert '±' in page
    assert publish.check(stem.with_suffix('.jsonl')) == publish.SAME
    # Made again, nothing is run.
    code, out, _ = run('branches', '--budget=tiny', f'--workdir={tmp_path / "runs"}', f'--output={stem}')
    assert code == 0
    assert 'started on' not in out
