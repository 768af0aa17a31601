"""The paper's named experiments: every point of every budget is accepted, and one of them is made from nothing."""

import importlib
import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from gau.experiments import plan, publish, runs
from gau.experiments import table as tables
from gau.experiments.job import Job
from gau.experiments.report import LABEL, RECORDS, value_of
from gau.experiments.sweep import Program, find_points, literal
from gau.training import workdir as files
from gau.training.config import flatten
from tests.conftest import ROOT
from tests.programs import call

FOUND = tables.find(ROOT / 'configs')
PAPER = sorted(name for name, (path, _) in FOUND.items() if path.parent.name == 'paper')
BEYOND = sorted(FOUND.keys() - set(PAPER))
BUDGETS = [(name, budget) for name in sorted(FOUND) for budget in FOUND[name][1].budgets]


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


@pytest.mark.parametrize(('name', 'budget'), BUDGETS)
def test_every_point_is_accepted_and_has_its_row(name, budget):
    # The prepared data need not be here.
    job = Job(name, *FOUND[name], budget)
    job.stand_in()
    points, table = job.points(), job.table
    assert [point.error for point in points if point.config is None] == []
    for point in points if name in PAPER else ():
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
    patterns = [each.points for each in table.evaluations] + [x for page in table.pages.values() for x in page.points]
    assert all(any(tables.fits(point.label, [pattern]) for point in points) for pattern in patterns)
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
    'no table': ([], 'want one table: borders, branches, chunk_size'),
    'unknown table': (['branchs'], 'did you mean "branches"'),
    'unknown budget': (['branches', '--budget=large'], 'large'),
    'missing with an output': (['--missing', '--output=x'], '--output does nothing with --missing'),
    'kept runs with a source': (
        ['branches', '--only_kept', '--source=text:x'],
        '--source does nothing with --only_kept',
    ),
    'a budget of the paper alone': (
        ['heads', '--budget=paper'],
        'heads is no table of the paper, and has tiny and small',
    ),
    'text without a tokenizer': (['titles', '--budget=small'], '--tokenizer=sentencepiece:FILE'),
    'no source': (['recall', '--budget=small', '--source=text:x'], '--source does nothing with --budget=small'),
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
    flags = dict(word.removeprefix('--').split('=', 1) for word in sweep[2:] if '=' in word)
    path, _, argument = flags['config'].partition(':')
    points = find_points(Program(path, argument, {'data.source': flags['config.data.source']}), flags['sweep'])
    assert not any(point.error for point in points)
    table = plan.costs(points, chip='H100', utilisation=0.4, vocab_size=int(flags['vocab_size']))
    assert '112,' in table  # millions of parameters, with the vocabulary that the data would have


def finish(directory, *, step=20):
    """Makes the directory of a run that is finished, as far as a table looks into it."""
    directory.mkdir(parents=True)
    files.write_json(directory / files.FINAL, {'step': step, 'eval': {}})


def commands(started, workdir):
    """Returns what was started since the last call, in words, with WORK in place of the directory."""
    lines = [' '.join(arguments[1:]).replace(str(workdir), 'WORK') for arguments in started]
    started.clear()
    return lines


def test_ranks_are_measured_of_the_runs_that_are_here_and_once(started, tmp_path):
    for name in ('gau', 'no_gate'):
        finish(tmp_path / f'{name}-seed_0')
    arguments = ['heads', f'--workdir={tmp_path}', f'--output={tmp_path / "tables" / "heads"}']
    code, _, err = call('scripts/reproduce.py', *arguments)
    assert code == 0, err
    sweep, ranks, report = commands(started, tmp_path)
    assert sweep == (
        'scripts/sweep.py --config=configs/heads.py:runlocal --sweep=heads,seed:2 --workdir=WORK --per_device=1'
    )
    assert ranks == (
        'scripts/attention_ranks.py WORK/gau-seed_0 WORK/no_gate-seed_0 --sequences=4 '
        '--json=WORK/tables/heads/ranks.jsonl --plot=WORK/tables/heads_ranks.png'
    )
    assert report == (
        'scripts/report.py WORK --title=Heads and the gate, FLASH-Quad --by=point --against=gau '
        '--output=WORK/tables/heads'
    )
    lines = ({'workdir': f'{name}-seed_0', 'step': 20} for name in ('gau', 'no_gate'))
    ranks_file = tmp_path / 'tables' / 'heads' / 'ranks.jsonl'
    ranks_file.write_text(''.join(json.dumps(line) + '\n' for line in lines))
    assert call('scripts/reproduce.py', *arguments)[0] == 0
    assert commands(started, tmp_path)[1] == (
        'scripts/attention_ranks.py WORK/tables/heads/ranks.jsonl --plot=WORK/tables/heads_ranks.png'
    )
    # Of one more run nothing is known yet.
    finish(tmp_path / 'gau_2_heads-seed_0')
    assert call('scripts/reproduce.py', *arguments)[0] == 0
    assert 'WORK/gau_2_heads-seed_0' in commands(started, tmp_path)[1]


def test_eval_py_measures_each_run_once_and_its_pages_are_of_the_runs_that_are_here(started, tmp_path):
    for name in ('chunk_64', 'transformer_plus_plus'):
        finish(tmp_path / f'{name}-seed_0')
    row = {'step': 20, 'split': 'borders/valid', 'loss': 3.0, 'context': 2048}
    (tmp_path / 'chunk_64-seed_0' / files.EVAL).write_text(json.dumps(row) + '\n')
    arguments = ['borders', f'--workdir={tmp_path}']
    code, out, err = call('scripts/reproduce.py', *arguments)
    assert code == 0, err
    done = commands(started, tmp_path)
    chunk, transformer = 'WORK/chunk_64-seed_0', 'WORK/transformer_plus_plus-seed_0'
    assert done[1:-3] == [
        f'eval.py --workdir={chunk} --evaluators=borders,repeated',
        f'eval.py --workdir={transformer} --evaluators=borders,repeated',
        *(f'eval.py --workdir={transformer} --evaluators=borders:chunk={chunk}' for chunk in (64, 128, 1024)),
        'scripts/report.py WORK --title=Borders between chunks --by=point --against=chunk_256 --output=WORK/report',
    ]
    assert done[-3:] == [
        f'scripts/report.py {chunk} {transformer} --title=Loss by place in the chunk: nothing mends the borders '
        '--evaluations --by=point --metric=border_loss --allow=data --output=WORK/report_bare',
        *(
            f'scripts/report.py WORK --title=Loss of {kind} pairs --by=point --split=repeated/valid '
            f'--metric={kind}_loss --output=WORK/report_{kind}'
            for kind in ('new', 'repeated')
        ),
    ]
    assert 'report_mended is left out: eval.py measures runs with their checkpoints, and none is here' in out
    # All that was measured is in one place, and is not measured again.
    (line,) = (tmp_path / 'report' / 'measured.jsonl').read_text().splitlines()
    assert json.loads(line) == {'run': 'chunk_64-seed_0', **row}
    assert call('scripts/reproduce.py', *arguments)[0] == 0
    assert [line for line in commands(started, tmp_path) if line.startswith('eval.py')] == []


def test_a_step_that_fails_is_the_last_and_is_made_again(monkeypatch, tmp_path):
    finish(tmp_path / 'best-seed_0')
    asked = []

    class Process:
        def __init__(self, arguments):
            asked.append(arguments[1])
            self.code = 3 if arguments[1] == 'eval.py' else 0

        def wait(self):
            return self.code

    monkeypatch.setattr(subprocess, 'Popen', Process)
    for _ in range(2):
        assert call('scripts/reproduce.py', 'far_recall', f'--workdir={tmp_path}')[0] == 3
    assert asked == ['scripts/sweep.py', 'eval.py'] * 2


def test_fields_and_text_are_told_to_the_sweep(started, tmp_path):
    given = '--source=jsonl:articles.jsonl', '--tokenizer=sentencepiece:t5.model'
    code, _, err = call('scripts/reproduce.py', 'titles', '--budget=small', f'--workdir={tmp_path}', *given)
    assert code == 0, err
    assert commands(started, tmp_path)[0] == (
        'scripts/sweep.py --config=configs/cross.py:task=titles --config.steps=300 --config.eval.every_steps=150 '
        '--config.checkpoint.every_steps=300 --config.data.source=jsonl:articles.jsonl '
        '--config.data.tokenizer=sentencepiece:t5.model --sweep=heads+controls+softmax,seed:2 --workdir=WORK '
        '--per_device=1'
    )


@pytest.mark.skipif((ROOT / 'data').exists(), reason='of the data there, not of the kept')
@pytest.mark.parametrize(
    ('name', 'points', 'kept'),
    [
        *(('borders', 26, 25), ('overlap_layers', 8, 8), ('heads', 10, 10), ('cross', 14, 11), ('far_books', 6, 5)),
        *(
            ('far_recall', 10, 5),
            ('recall_255', 10, 5),
            ('recall', 14, 14),
            ('recall_16', 14, 14),
            ('recall_64', 14, 14),
        ),
    ],
)
def test_what_is_kept_of_a_table_beyond_the_paper(name, points, kept):
    code, out, err = call('scripts/reproduce.py', '--missing', name, '--budget=small')
    assert code == 0, err
    # Of one seed at least; others are added.
    (found,) = re.findall(rf'^{name} +(\d+) +(\d+) +\d+$', out, re.M)
    assert int(found[0]) == points
    assert int(found[1]) >= kept


@pytest.mark.skipif((ROOT / 'data').exists(), reason='of the data there, not of the kept')
def test_the_table_so_far_has_the_pages_that_need_no_checkpoints(started, tmp_path):
    given = '--kept=docs/results', f'--output={tmp_path / "borders"}'
    code, out, err = call('scripts/reproduce.py', 'borders', '--budget=small', '--only_kept', *given)
    assert code == 0, err
    made = [command.rpartition('--output=')[2] for command in commands(started, tmp_path)]
    assert made == ['WORK/borders', 'WORK/borders_new', 'WORK/borders_repeated']
    assert out.count('is left out') == 2


def test_two_programs_with_a_table_of_one_name_are_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / 'studies').mkdir()
    for name in ('one', 'other'):
        (tmp_path / 'studies' / f'{name}.py').write_text('\nTABLES = {"x": None}\n')
    with pytest.raises(ValueError, match=r'other\.py and .*one\.py both have a table "x"'):
        tables.find(tmp_path / 'studies')


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


@pytest.mark.slow
def test_a_table_is_measured_at_longer_contexts_and_by_other_evaluators(tmp_path):
    stem = tmp_path / 'tables' / 'far'
    arguments = 'far_books', '--budget=tiny', f'--workdir={tmp_path / "runs"}', f'--output={stem}'
    code, out, err = run(*arguments)
    assert code == 0, out + err
    for page in ('contexts', 'passkey'):
        kept = stem.with_name(f'far_{page}.jsonl')
        assert publish.check(kept) == publish.SAME
        labels = {run.label for run in runs.load(kept)[0]}
        assert len(labels) == 6
        assert any(label.startswith('rope_local_far_4') and label.endswith('context=2048') for label in labels)
    # Three runs at two lengths by two evaluators.
    lines = [json.loads(line) for line in (stem / 'measured.jsonl').read_text().splitlines()]
    measured = {(line['run'], line['split'], line['context']) for line in lines}
    assert len(measured) == 12
    # Made again, nothing is trained or measured.
    code, out, err = run(*arguments)
    assert code == 0, out + err
    assert 'started on' not in out
    assert 'eval.py' not in re.findall(r'^\$ python (\S+)', out, re.M)
