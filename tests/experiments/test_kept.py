"""Kept runs in place of points: what is taken for one, and that a sweep neither runs it again nor leaves it out."""

import json
import subprocess
import sys

import pytest

from gau.data import places, tokenizers
from gau.errors import UserError
from gau.experiments import kept, page, report, runs
from gau.experiments.report import Options
from gau.experiments.sweep import Program, find_points
from gau.models.fields import GONE
from gau.objectives import objective as objectives
from tests.conftest import ROOT
from tests.experiments.test_runner import losses, run, say, starts
from tests.models.tiny import tiny_config as model_config
from tests.programs import call

PROGRAM = Program(str(ROOT / 'tests' / 'experiments' / 'program.py'))
POINTS = find_points(PROGRAM, 'chunk_size,seed:2')
DATA = POINTS[0].config.data
HELD = places.contents(DATA)[0].removeprefix('source ')
without_data = pytest.mark.skipif((ROOT / 'data' / 'wiki_en').exists(), reason='of the data there, not of the kept')
FINGERPRINT = tokenizers.load(DATA.tokenizer).fingerprint


def made(point, *, data=None, **changes):
    config = runs.flat(point.config) | {path.replace('__', '.'): value for path, value in changes.items()}
    facts = {'data': data or {'embedded': HELD}, 'tokenizer': FINGERPRINT, 'command': None, 'commits': []}
    facts |= {'device': 'none', 'versions': {}, 'tokens': 1536, 'parameters': 1, 'tokens_per_second': None}
    return runs.Run(f'old-{config["seed"]}', 'old', None, config, {'valid': {'loss': 2.5}}, {}, facts)


def written(path, *found):
    path.write_text(runs.dump(found, {'report': None}))
    return path


def matches(path, points=POINTS, **how):
    return kept.match(points, kept.load([path]), **how)


def answered(found):
    return [each is not None for each in found.points]


def test_a_run_of_the_same_config_seed_and_data_is_the_points(tmp_path):
    found = matches(written(tmp_path / 'old.jsonl', made(POINTS[1]), made(POINTS[2])))
    assert answered(found) == [False, True, True, False]
    assert found.points[1].path == tmp_path / 'old.jsonl'
    # How it was stored and looked at on the way decides nothing.
    free = made(POINTS[0], checkpoint__every_steps=77, eval__every_steps=3, log__every_steps=9)
    assert answered(matches(written(tmp_path / 'old.jsonl', free))) == [True, False, False, False]


@pytest.mark.parametrize(
    'changes',
    [
        {'optimizer__learning_rate': 0.123},
        {'model__expansion_factor': 1.0},
        {'data__batch_size': 4},
        {'eval__max_tokens': 400},
        {'seed': 7},
        {'init_from': 'runs/other'},
        {'data': {'embedded': 'of another day'}},
    ],
    ids=str,
)
def test_a_run_that_differs_is_not(tmp_path, changes):
    assert not any(answered(matches(written(tmp_path / 'old.jsonl', made(POINTS[0], **changes)))))


def test_a_point_that_starts_from_another_run_is_never_kept(tmp_path):
    old = written(tmp_path / 'old.jsonl', made(POINTS[0], init_from='runs/other'))
    points = find_points(Program(PROGRAM.path, '', {'init_from': 'runs/other'}), 'chunk_size,seed:2')
    assert not any(answered(matches(old, points)))


def test_fields_that_configs_have_got_since_stand_at_their_defaults(tmp_path):
    old = made(POINTS[0])
    del old.config['model.local_window']
    assert answered(matches(written(tmp_path / 'old.jsonl', old))) == [True, False, False, False]


def test_a_field_that_is_gone_and_one_of_a_model_that_is_not_known_say_nothing(tmp_path):
    old = made(POINTS[0])
    today = old.config_hash()
    old.config.update({'model.head_decay': 0.0, 'model.global_norm': 'none', 'model.global_decay': 1.0})
    assert old.config_hash() == today
    path = written(tmp_path / 'old.jsonl', old)
    # A study that is imported after the kept runs were read brings a field that none of these models has.
    (found,) = kept.load([path])
    found.run.config['model.of_a_study'] = None
    assert answered(kept.match(POINTS, [found])) == [True, False, False, False]


@pytest.mark.parametrize(
    ('name', 'fields', 'decay'),
    [
        ('flash', {'decay_gate': 'none'}, 1.0),
        ('flash', {'decay_gate': 'scalar'}, None),
        ('flash', {'branches': 'local'}, None),
        ('mc_transformer_plus_plus', {}, 1.0),
        ('flash_quad', {}, None),
    ],
)
def test_a_decay_that_is_gone_stood_where_a_state_had_no_gate(name, fields, decay):
    config = model_config(name, **fields)
    assert GONE['global_decay'].stood(config) == decay


def test_runs_of_other_data_are_told(tmp_path):
    old = written(tmp_path / 'old.jsonl', made(POINTS[0]), made(POINTS[1], data={'embedded': 'of another day'}))
    assert matches(old).told() == (
        f'1 of 4 points are kept, of embedded ({HELD}); '
        '1 are kept of other data, embedded (of another day), and do not count'
    )


def test_where_the_data_are_not_here_those_of_most_runs_are_taken(tmp_path):
    prepared = {'data__source': 'tokens:wiki', 'data__tokenizer': 'sentencepiece:model'}
    own = [made(point, data={'tokens:wiki': 'new'}, **prepared) for point in POINTS[1:3]]
    others = [made(POINTS[0], data={'tokens:wiki': 'old'}, **prepared), made(POINTS[3])]
    old = written(tmp_path / 'old.jsonl', *others, *own)
    assert answered(matches(old, source='tokens:data/wiki')) == [False, True, True, False]
    assert not any(answered(matches(old, source='tokens:data/books')))


def test_pairs_that_are_drawn_are_told_apart_by_their_number(tmp_path):
    program = Program(str(ROOT / 'configs' / 'recall.py'))
    few, many = (find_points(program, f':pairs:{pairs},models,seed:1') for pairs in (16, 64))
    run_of_few = made(few[0], data={'pairs:16': 'drawn'})
    run_of_few.facts['tokenizer'] = objectives.load('recall').tokenizer(few[0].config.data).fingerprint
    old = written(tmp_path / 'old.jsonl', run_of_few)
    assert sum(answered(matches(old, few))) == 1
    assert not any(answered(matches(old, many)))


def test_a_table_of_any_text_takes_kept_runs_whatever_it_is_called(tmp_path):
    text = {'data__source': 'jsonl:articles.jsonl', 'data__tokenizer': 'sentencepiece:t5.model'}
    own = [made(point, data={'jsonl:articles.jsonl': 'new'}, **text) for point in POINTS[:2]]
    old = written(tmp_path / 'old.jsonl', *own, made(POINTS[2], data={'jsonl:other.jsonl': 'old'}, **text))
    assert answered(matches(old, source=kept.ANY)) == [True, True, False, False]


def test_a_run_that_several_tables_miss_is_missing_once():
    tables = {'one': POINTS, 'other': find_points(PROGRAM, 'model.chunk_size:32:64,seed:1')}
    missed, found = kept.missing(tables, [])
    assert [(one.point.name, one.tables) for one in missed] == [
        ('chunk_size_16-seed_0', ['one']),
        ('chunk_size_16-seed_1', ['one']),
        ('chunk_size_32-seed_0', ['one', 'other']),
        ('chunk_size_32-seed_1', ['one']),
        ('chunk_size_64-seed_0', ['other']),
    ]
    assert len(found.points) == 6


def test_tables_of_different_texts_are_matched_with_their_own(tmp_path):
    tables = {'wiki': POINTS[:2], 'books': POINTS[2:]}
    old = written(
        tmp_path / 'old.jsonl',
        *(
            made(point, data={f'tokens:{name}': 'held'}, data__source=f'tokens:{name}')
            for name, points in tables.items()
            for point in points[:1]
        ),
    )
    sources = {'wiki': 'tokens:data/wiki', 'books': 'tokens:data/books'}
    missed, found = kept.missing(tables, kept.load([old]), sources=sources)
    assert [(one.point.name, one.tables) for one in missed] == [
        (POINTS[1].name, ['wiki']),
        (POINTS[3].name, ['books']),
    ]
    assert found.told() == '2 of 4 points are kept, of tokens:books (held), tokens:wiki (held)'


def test_a_sweep_runs_what_is_not_kept_and_its_report_has_both(tmp_path):
    first, second, day = tmp_path / 'first', tmp_path / 'second', tmp_path / 'day.jsonl'
    assert run('--sweep=model.chunk_size:16,seed:2:1', f'--workdir={first}')[0] == 0
    code, _, err = call('scripts/report.py', str(first), f'--output={day}')
    assert code == 0, err
    code, out, err = run('--sweep=chunk_size,seed:2', f'--workdir={second}', f'--kept={day}', '--per_device=3')
    assert code == 0, err
    assert f'chunk_size_16-seed_1 KEPT in {day}' in ' '.join(out.split())
    assert 'finished: 4 of 4 points, 1 of them kept runs' in out
    ran = ['chunk_size_16-seed_0', 'chunk_size_32-seed_0', 'chunk_size_32-seed_1']
    assert sorted(starts(second)) == sorted(losses(second)) == ran
    found, unfinished = runs.find([second])
    # Seed 2 of chunk_size_16 is kept, too, and a row's whatever the sweep asked for.
    assert sorted(one.name for one in found) == sorted([*ran, 'chunk_size_16-seed_1', 'chunk_size_16-seed_2'])
    assert not unfinished
    rows = report.make(found, Options()).rows
    assert [(row.values, sorted(row.runs)) for row in rows] == [
        ({'model.chunk_size': 16}, [0, 1, 2]),
        ({'model.chunk_size': 32}, [0, 1]),
    ]
    # The file beside the directory adds nothing, whatever the runs are called there.
    assert len(runs.find([second, day])[0]) == 5

    # Of a sweep all of whose points are kept nothing is run; a directory of files and one of a sweep do as well.
    for number, place in enumerate((tmp_path, second)):
        third = tmp_path / f'third_{number}'
        code, out, err = run('--sweep=model.chunk_size:16,seed:2:1', f'--workdir={third}', f'--kept={place}')
        assert code == 0, err
        assert 'finished: 2 of 2 points, 2 of them kept runs' in out
        assert not (third / 'attempts.jsonl').exists()
        assert {'chunk_size_16-seed_1', 'chunk_size_16-seed_2'} <= {one.name for one in runs.find([third])[0]}
    # With one field changed, everything is.
    code, out, _ = say('--sweep=chunk_size,seed:2', f'--kept={day}', '--config.steps=13', '--dry_run')
    assert code == 0
    assert 'KEPT' not in out
    assert '0 of 4 points are kept' in out


def test_a_point_that_the_sweep_has_run_itself_is_its_own(tmp_path):
    first, second = tmp_path / 'first', tmp_path / 'second'
    for directory in (first, second):
        assert run('--sweep=chunk_size', f'--workdir={directory}')[0] == 0
    final = json.loads((first / 'chunk_size_16' / 'final.json').read_text())
    final['eval']['valid']['loss'] = 9.0
    (first / 'chunk_size_16' / 'final.json').write_text(json.dumps(final))
    code, out, err = run('--sweep=chunk_size', f'--workdir={second}', f'--kept={first}')
    assert code == 0, err
    assert 'finished: 2 of 2 points\n' in out
    assert sorted(one.metrics['valid']['loss'] for one in runs.find([second])[0])[-1] < 9


def test_a_dry_run_shows_what_is_kept_and_counts_only_the_rest(tmp_path):
    old = written(tmp_path / 'old.jsonl', *map(made, POINTS[:3]))
    code, out, err = say('--sweep=chunk_size,seed:2', f'--kept={old}', '--dry_run')
    assert code == 0, err
    table = out.splitlines()[-5:]
    assert [line.endswith('  kept') for line in table] == [True, True, True, False, False]
    code, alone, _ = say('--sweep=model.chunk_size:32,seed:1:1', '--dry_run')
    assert table[-1].partition(': ')[2] == alone.splitlines()[-1].partition(': ')[2]
    assert table[-1].startswith('what is left: ')


def test_bad_places_are_one_line(tmp_path):
    (tmp_path / 'bad.jsonl').write_text('{"split": "train"}\n')
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.txt').write_text('precious')
    for name, hint in {
        'bad.jsonl': 'cannot be read as the kept runs of a table',
        'none.jsonl': 'is no file of kept runs',
        'empty': 'is no file of kept runs',
        'text.txt': 'is no file of kept runs',
    }.items():
        for command in (('--sweep=chunk_size', '--dry_run'), None):
            arguments = [f'--kept={tmp_path / name}']
            code, _, err = (
                say(*command, *arguments) if command else call('scripts/reproduce.py', '--missing', *arguments)
            )
            assert (code, err.count('\n')) == (2, 1), err
            assert hint in err


@without_data
def test_what_is_missing_from_the_papers_tables():
    code, out, err = call('scripts/reproduce.py', '--missing', 'branches', 'seeds', '--budget=small')
    assert code == 0, err
    # What is kept of a finished table is found, however the defaults of the day have changed.
    assert [line.split() for line in out.splitlines() if line.startswith(('branches', 'seeds'))] == [
        ['branches', '9', '9', '0'],
        ['seeds', '10', '10', '0'],
    ]
    assert '0 different runs are missing' in out
    # Three points of FLASH as it is are kept of each; two tables have six in common.
    arguments = ('--missing', 'chunk_size', 'expansion', '--budget=small', '--kept=docs/results/seeds.jsonl')
    code, out, err = call('scripts/reproduce.py', *arguments)
    assert code == 0, err
    assert [line.split() for line in out.splitlines() if line.startswith('all')] == [['all', '57', '6', '51']]
    assert '48 different runs are missing' in out
    assert [line.split()[1] for line in out.splitlines() if line.endswith('  expansion')] == [
        'context_1024-chunk_size_128'
    ]
    code, dry, _ = call('scripts/reproduce.py', 'branches', '--budget=small', '--dry_run', '--kept=docs/results')
    assert '0 different runs are missing' in dry


def test_a_table_is_told_what_is_kept(started, tmp_path):
    code, _, err = call('scripts/reproduce.py', 'branches', f'--kept={tmp_path},docs/results')
    assert code == 0, err
    sweep, _ = started
    assert f'--kept={tmp_path},docs/results' in sweep


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match='no sweep'):
        kept.load([tmp_path])


@without_data
def test_the_table_so_far_is_made_without_data_or_runs(tmp_path):
    results, stem = ROOT / 'docs' / 'results', tmp_path / 'gau_ablation'
    # As a program: it starts another.
    arguments = (f'--kept={results / "gau_ablation.jsonl"}', f'--output={stem}')
    done = subprocess.run(
        [sys.executable, 'scripts/reproduce.py', 'gau_ablation', '--budget=small', '--only_kept', *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    made_now, published = (path.read_text() for path in (stem.with_suffix('.md'), results / 'gau_ablation.md'))
    assert made_now.partition(page.BEGIN)[2] == published.partition(page.BEGIN)[2]


def test_the_table_so_far_needs_runs_and_a_place(tmp_path):
    for arguments, hint in (
        (['--kept=docs/results'], 'needs --kept=FILE|DIR,... and --output=PATH'),
        ([f'--output={tmp_path / "table"}'], 'needs --kept=FILE|DIR,... and --output=PATH'),
        ([f'--kept={written(tmp_path / "old.jsonl", made(POINTS[0]))}', f'--output={tmp_path / "table"}'], 'no run of'),
    ):
        code, _, err = call('scripts/reproduce.py', 'norms', '--only_kept', *arguments)
        assert (code, err.count('\n')) == (2, 1), err
        assert hint in err
