"""Reports of made-up runs, whose numbers are known; of real ones: test_acceptance.py."""

import csv
import json
import math

import numpy as np
import pytest

from configs import quickstart
from gau.errors import UserError
from gau.experiments import evaluated, figures, page, publish, report, runs, statistics
from gau.experiments.report import Options
from gau.experiments.runs import Run
from gau.training import workdir as files
from gau.training.config import default_config, flatten, resolve
from gau.training.workdir import config_to_dict
from tests.programs import call

CONFIG = flatten(config_to_dict(resolve(default_config())))


def made_up(loss, *, seed=0, name=None, tokens=1000, data='embedded', speed=100.0, eval_tokens=500, **fields):
    config = {**CONFIG, 'seed': seed, **{path.replace('__', '.'): value for path, value in fields.items()}}
    label = name or '-'.join(map(str, fields.values())) or 'base'
    return Run(
        name=f'{label}-seed_{seed}',
        label=label,
        swept=[path.replace('__', '.') for path in fields],
        config=config,
        metrics={'valid': {'loss': loss, 'perplexity': 2 * loss, 'tokens': eval_tokens}},
        curves={
            'valid': [[step * 100, step * 0.5, loss + (10 - step) / 10] for step in (2, 4, 6, 8, 10)],
            'train': [[1000, 5.0, loss]],
        },
        facts={
            'command': f'python train.py --config.seed={seed}',
            'commits': ['abc'],
            'device': '1 x cpu',
            'versions': {},
            'tokenizer': 'bytes',
            'data': {data: 'f00d'},
            'tokens': tokens,
            'parameters': 1_500_000,
            'flops_per_token': 10.0,
            'tokens_per_second': speed,
        },
    )


def models(**changes):
    losses = {'flash': (3.0, 3.1, 3.05), 'transformer_plus_plus': (3.2, 3.28, 3.26)}
    return [
        made_up(loss, seed=seed, model__name=model, **changes)
        for model, own in losses.items()
        for seed, loss in enumerate(own)
    ]


def test_rows_are_settings_over_their_seeds():
    made = report.make(models(), Options(against='transformer_plus_plus'))
    assert made.options.by == ('model.name',)
    assert [row.values for row in made.rows] == [{'model.name': 'flash'}, {'model.name': 'transformer_plus_plus'}]
    flash, baseline = made.rows
    assert flash.mean.value == pytest.approx(3.05)
    assert flash.against.difference.value == pytest.approx((-0.2 - 0.18 - 0.21) / 3)
    assert flash.against.p < 0.01
    assert baseline.against is None
    assert made.sigma.degrees == 4


def test_when_a_row_came_to_the_baselines_loss():
    made = report.make(models(), Options(against='transformer_plus_plus'))
    # 0.1967 nats lower at the end, and 0.1 nats a 100 tokens or half a second.
    tokens, seconds = made.rows[0].reached
    assert tokens == pytest.approx(1000 - 100 * 0.59 / 3 / 0.1, abs=0.01)
    assert seconds == pytest.approx(5 - 0.5 * 0.59 / 3 / 0.1, abs=1e-4)
    assert made.rows[1].reached == (1000, 5)
    worse = report.make(models(), Options(against='flash'))
    assert worse.rows[1].reached is None


def test_a_curve_has_the_tokens_at_which_all_seeds_were_evaluated():
    often, seldom = made_up(3.0), made_up(3.1, seed=1)
    seldom.curves['valid'] = [[tokens, tokens / 200, 3.1 + (10 - tokens / 100) / 10] for tokens in (500, 800, 1000)]
    (row,) = report.make([often, seldom], Options()).rows
    np.testing.assert_allclose(report.mean_curve(row, 'valid')[:, :3], [[800, 4, 3.25], [1000, 5, 3.05]])
    assert report.mean_curve(row, 'test').shape == (0, 5)


def test_each_family_has_its_own_baseline():
    names = ('flash', 'flash_quad', 'transformer_plus_plus', 'mc_transformer_plus_plus')
    found = [made_up(3 + place / 10, model__name=name) for place, name in enumerate(names)]
    made = report.make(found, Options(by=('family', 'attention'), against='attention=quadratic'))
    rows = {tuple(row.values.values()): row for row in made.rows}
    assert rows['gated_unit', 'mixed_chunk'].against.difference.value == pytest.approx(-0.1)
    assert rows['transformer', 'mixed_chunk'].against.difference.value == pytest.approx(0.1)
    assert rows['gated_unit', 'quadratic'].against is None
    with pytest.raises(UserError, match='"gone", which is not registered'):
        report.make([made_up(3.0, model__name='gone')], Options(by=('family',)))


@pytest.mark.parametrize('against', ['2', '2.0', '2e0', 'model.expansion_factor=2,model.name=flash'])
def test_a_baseline_is_named_as_the_table_shows_it_or_as_it_was_given(against):
    found = [made_up(3 + factor, model__expansion_factor=factor) for factor in (1.0, 2.0)]
    by = ('model.expansion_factor', 'model.name')
    made = report.make(found, Options(by=by, against=against))
    assert made.baselines == [{'model.expansion_factor': 2.0, 'model.name': 'flash'}]
    assert '| 2 ' in page.table(made)
    for wrong, hint in (('3', 'no row has model.expansion_factor=3; choose from 1, 2'), ('1,model.name=x', '=x; ')):
        with pytest.raises(UserError, match=hint):
            report.make(found, Options(by=by, against=wrong))


def test_two_fields_are_compared_row_by_row():
    found = [
        made_up(loss + seed / 10, seed=seed, model__name=model, data__context=context, tokens=1000)
        for (model, context), loss in {
            ('flash', 512): 3.0,
            ('flash', 1024): 2.9,
            ('performer', 512): 3.5,
            ('performer', 1024): 3.6,
        }.items()
        for seed in (0, 1)
    ]
    made = report.make(found, Options(against='model.name=performer'))
    differences = {tuple(row.values.values()): row.against and row.against.difference.value for row in made.rows}
    assert differences[('flash', 512)] == pytest.approx(-0.5)
    assert differences[('flash', 1024)] == pytest.approx(-0.7)
    assert differences[('performer', 1024)] is None
    assert len(made.baselines) == 2


def test_each_row_takes_its_best_learning_rate():
    found = [
        made_up(loss + seed, seed=seed, model__name=model, optimizer__learning_rate=rate)
        for (model, rate), loss in {
            ('flash', 1e-3): 3.2,
            ('flash', 3e-3): 3.0,
            ('performer', 1e-3): 3.4,
            ('performer', 3e-3): 3.9,
        }.items()
        for seed in (0, 1)
    ]
    made = report.make(found, Options(best='optimizer.learning_rate'))
    assert [tuple(row.values.values()) for row in made.rows] == [('flash', 3e-3), ('performer', 1e-3)]


def test_the_best_accuracy_is_the_largest():
    found = [made_up(1.0, model__chunk_size=size) for size in (1, 2, 3, 4)]
    for run, accuracy in zip(found, (0.5, math.nan, 0.9, 0.7), strict=True):
        run.metrics['valid']['accuracy'] = accuracy
    made = report.make(found, Options(by=('model.name',), best='model.chunk_size', metric='accuracy'))
    assert [row.values['model.chunk_size'] for row in made.rows] == [3]


REFUSED = {
    'no run': ([], Options(), 'no finished run to report'),
    'other data': (models() + models(data='other')[:1], Options(), '--allow=data'),
    'other tokens': (models() + models(tokens=2000)[:1], Options(), '--allow=tokens'),
    'other held-out text': (models() + models(eval_tokens=900)[:1], Options(), '500 and 900 tokens of valid'),
    'unknown allowance': (models(), Options(allow=('tokns',)), 'did you mean "tokens"'),
    'unknown field': (models(), Options(by=('model.nam',)), 'did you mean "model.name"'),
    'unknown row': (models(), Options(against='flsh'), 'did you mean "flash"'),
    'against another field': (models(), Options(against='seed=3'), 'seed is not in --by'),
    'unknown split': (models(), Options(split='vald'), 'did you mean "valid"'),
    'unknown metric': (models(), Options(metric='accuracy'), 'choose from loss, perplexity, tokens'),
    'mixed row': (models(), Options(by=('data.context',)), 'would mix runs that differ in model.name'),
    'a seed twice': (models() + models()[:1], Options(), 'two runs of one setting and seed'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_refused(name):
    found, options, hint = REFUSED[name]
    with pytest.raises(UserError, match=hint):
        report.make(found, options)


def test_allowed_when_told():
    mixed = [made_up(3.0 + seed, seed=seed, model__name='performer', tokens=9) for seed in (0, 1)]
    made = report.make(models() + mixed, Options(by=('model.name',), allow=('tokens',)))
    assert len(made.rows) == 3


def test_one_seed_has_no_interval_and_no_p(tmp_path):
    found = [run for run in models() if run.seed == 0]
    made = report.make(found, Options(against='flash'))
    text = publish.write(made, found, tmp_path / 'one')
    assert '3.0000 (n=1)' in text
    assert 'nothing here says how far chance goes' in text
    assert made.rows[1].against.p is None
    # Beside rows with seeds, their spread says what a single run is worth.
    more = [*models(), made_up(3.5, model__name='performer')]
    made = report.make(more, Options(against='flash'))
    single = next(row for row in made.rows if row.values['model.name'] == 'performer')
    assert single.against.difference.value == pytest.approx(3.5 - made.rows[0].mean.value)
    assert f'{single.against}' in page.table(made)
    assert '(n=1, 3)' in page.table(made)
    assert 'share fewer than two seeds' in page.table(made)
    assert single.holm >= single.against.p
    made = report.make(models(), Options(against='flash'))
    assert 'share fewer than two seeds' not in page.table(made)


@pytest.fixture
def published(tmp_path):
    found = [
        made_up(3 + size / 1000 + seed / 100, seed=seed, speed=1000.0 - size, model__chunk_size=size)
        for size in (64, 128, 256)
        for seed in (0, 1, 2)
    ]
    made = report.make(found, Options(against='64', title='Chunks'))
    publish.write(made, found, tmp_path / 'chunks')
    return tmp_path


def test_figures_name_the_fields_whose_values_they_show(monkeypatch, tmp_path):
    drawn = {}
    monkeypatch.setattr(figures.plots, 'save', lambda canvas, path: drawn.update({path.stem: canvas.axes[0]}))
    rows = [
        made_up(3.0, speed=1e4 * size * layers, model__chunk_size=size, model__num_layers=layers)
        for size in (64, 128, 256)
        for layers in (1, 2)
    ]
    figures.draw(report.make(rows, Options()), tmp_path / 'x')
    both = 'model.chunk_size, model.num_layers'
    assert {name: axes.get_legend().get_title().get_text() for name, axes in drawn.items()} == {
        **{name: both for name in ('x_tokens', 'x_time', 'x_speed')},
        'x_values': 'model.num_layers',
    }
    assert [text.get_text() for text in drawn['x_speed'].get_legend().get_texts()][:2] == ['64, 1', '64, 2']
    assert drawn['x_speed'].xaxis.get_major_formatter()(2e7) == '20 M'
    # Six names would hide the curves, three do not.
    drawn['x_tokens'].figure.draw_without_rendering()
    assert drawn['x_tokens'].get_legend().get_window_extent().y1 < drawn['x_tokens'].get_window_extent().y0
    assert drawn['x_values'].get_legend().get_bbox_to_anchor() is drawn['x_values'].bbox


def test_notes_are_short_lines_and_passes_are_told_where_one_run_knows_them():
    found = models()
    found[0].facts['passes'] = {'text': '2.8'}
    text = page.table(report.make(found, Options(against='transformer_plus_plus')))
    notes = text.split('\n\n')[1].splitlines()
    assert len(notes) > 3
    assert max(map(len, notes)) <= page.WIDTH
    assert text.count('(2.8 passes over the text)') == 1


def test_files_of_a_report(published):
    names = {path.name for path in published.iterdir()}
    figures = {f'chunks_{name}.png' for name in ('tokens', 'time', 'values', 'speed')}
    assert names == figures | {'chunks.md', 'chunks.csv', 'chunks.jsonl'}
    rows = list(csv.DictReader((published / 'chunks.csv').open()))
    assert len(rows) == 9
    for column in ('command', 'commits', 'config_hash', 'data', 'tokenizer', 'device', 'tokens'):
        assert all(row[column] for row in rows)
    page = (published / 'chunks.md').read_text()
    assert page.startswith('# Chunks\n')
    assert '| 128 ' in page
    assert 'baseline' in page
    assert 'Standard deviation between seeds: 0.0100' in page


def test_a_run_whose_loss_is_not_a_number_is_shown_as_one_and_spoils_no_other(tmp_path):
    found = [
        made_up(size / 100 + seed / 10, seed=seed, model__chunk_size=size) for size in (1, 2, 3) for seed in (0, 1)
    ]
    found[2] = made_up(math.nan, seed=0, model__chunk_size=2)._replace(curves={'valid': []})
    made = report.make(found, Options(against='3'))
    one, broken, _ = made.rows
    assert (str(one.mean), str(broken.mean)) == ('0.060 ± 0.635 (n=2)', 'nan ± nan (n=2)')
    assert made.sigma.value == pytest.approx(0.1 / math.sqrt(2))
    assert 'nan ± nan (n=2)' in publish.write(made, found, tmp_path / 'chunks')
    assert (tmp_path / 'chunks.jsonl').read_text().count('"NaN"') == 2  # loss and perplexity
    again, _ = runs.find([tmp_path / 'chunks.jsonl'])
    assert math.isnan(again[2].metrics['valid']['loss'])
    rows = report.make(again, Options(against='3')).rows
    assert [str(row.mean) for row in rows] == [str(row.mean) for row in made.rows]
    # A learning rate at which it broke is never the best one.
    best = report.make(found, Options(by=('model.name',), best='model.chunk_size'))
    assert [row.values['model.chunk_size'] for row in best.rows] == [1]
    assert math.isnan(statistics.holm([0.5, math.nan])[1])


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    publish.keep([run for run in models() if run.seed == 0], tmp_path / 'day.jsonl')
    code, out, err = call('scripts/report.py', f'{tmp_path}/day.jsonl', '--by=seed', f'--output={tmp_path}/more.jsonl')
    assert (code, out) == (2, '')
    assert '--by does nothing with --output=' in err
    code, out, err = call('scripts/report.py', f'{tmp_path}/day.jsonl', f'--output={tmp_path}/day.jsonl/table')
    assert (code, out, err.count('\n')) == (2, '', 1), err
    assert f'--output={tmp_path}/day.jsonl/table.md cannot be written: Not a directory' in err


def test_times_of_runs_that_shared_a_device_are_not_shown(tmp_path):
    found = [run for run in models() if run.seed == 0]
    found[0].facts['per_device'] = 4
    (tmp_path / 'shared_time.png').touch()
    text = publish.write(report.make(found, Options(against='flash')), found, tmp_path / 'shared')
    assert 'Up to 4 of the runs shared a device' in text
    assert 'tokens to its loss' in text
    assert 'time to its loss' not in text
    assert 'tokens/s' not in text
    assert [path.name for path in tmp_path.glob('*.png')] == ['shared_tokens.png']


def test_check_finds_what_was_changed(published):
    kept, page = published / 'chunks.jsonl', published / 'chunks.md'
    assert publish.check(kept) == publish.SAME
    # What people write around the marks is theirs, and a report made again leaves it.
    page.write_text(page.read_text() + '\nWhat it says: smaller is better.\n')
    assert publish.check(kept) == publish.SAME
    found, header = runs.load(kept)
    publish.write(
        report.make(found, Options(**{**header['report'], 'by': ('model.chunk_size',), 'allow': ()})),
        found,
        published / 'chunks',
    )
    assert page.read_text().endswith('What it says: smaller is better.\n')
    page.write_text(page.read_text().replace('0.0100', '0.0101'))
    assert publish.check(kept) != publish.SAME
    page.write_text('mine')
    with pytest.raises(UserError, match='marks are missing'):
        publish.check(kept)
    kept.write_text('{')
    with pytest.raises(UserError, match='cannot be read'):
        publish.check(kept)


def test_kept_lines_give_the_runs_back(tmp_path):
    found = models()
    (tmp_path / 'kept.jsonl').write_text(runs.dump(found, {'report': {}}))
    again, header = runs.load(tmp_path / 'kept.jsonl')
    assert again == [Run(*json.loads(json.dumps(run))) for run in found]
    assert header == {'report': {}}


def test_kept_files_of_several_days_are_one_table(tmp_path):
    first = [made_up(3 + seed / 10, seed=seed, model__chunk_size=size) for size in (128, 256) for seed in (0, 1)]
    later = [made_up(3.3, seed=3, model__chunk_size=256)]
    # A run kept before a field existed has its default now.
    old = [run._replace(config={k: v for k, v in run.config.items() if k != 'model.remat'}) for run in first]
    days = [tmp_path / f'day_{number}.jsonl' for number in (1, 2)]
    publish.keep(old, days[0])
    publish.keep([*first, *later], days[1])
    found, unfinished = runs.find(days)
    assert ([run.name for run in found], unfinished) == ([run.name for run in [*first, *later]], {})
    assert {run.config['model.remat'] for run in found} == {'none'}
    assert [row.mean.n for row in report.make(found, Options()).rows] == [2, 3]
    with pytest.raises(UserError, match='given twice'):
        runs.find(days[:1] * 2)
    with pytest.raises(UserError, match='without a table'):
        publish.check(days[0])
    with pytest.raises(UserError, match='no finished run to keep'):
        publish.keep([], days[0])


def test_places_on_a_machine_are_not_kept():
    assert runs.without_place('tokens:/home/me/data/wiki_en') == 'tokens:wiki_en'
    assert runs.without_place('--config.data.source=jsonl:/a/b/*.jsonl') == '--config.data.source=jsonl:*.jsonl'
    assert runs.without_place('tfds:wiki40b/en') == 'tfds:wiki40b/en'
    assert runs.without_place('--config=configs/lm.py:data=embedded') == '--config=configs/lm.py:data=embedded'


def test_data_is_what_it_holds_however_often_it_was_prepared(tmp_path):
    final = {'step': 3, 'device': 'cpu', 'versions': {}, 'parameters': 1, 'flops_per_token': 1, 'eval': {}}
    for place, plan in (('a', 'manifest 1'), ('b', 'manifest 2')):
        workdir = tmp_path / place
        workdir.mkdir()
        config = quickstart.get_config()
        config.data.source, config.data.valid_source = f'tokens:/{place}/wiki', f'jsonl:/{place}/held.jsonl'
        data = {config.data.source: plan, 'tokenizer': 'f00d'}
        files.write_json(workdir / files.CONFIG, files.config_to_dict(config))
        passes = {config.data.source: {'times': 6.6, 'tokens': 9, 'exact': False}}
        files.write_json(workdir / files.FINAL, final | {'data': data, 'passes': passes})
        files.write_json(
            workdir / files.DATA, {'contents': ['source abc', 'valid_source def', 'tokenizer f00d'], 'directories': []}
        )
        row = {'step': 3, 'split': 'train', 'loss': 1.0, 'tokens': 512, 'step_seconds': 0.1}
        (workdir / files.METRICS).write_text(json.dumps(row) + '\n')
        facts = runs.read(workdir).facts
        assert (facts['data'], facts['tokenizer']) == ({'tokens:wiki': 'abc', 'jsonl:held.jsonl': 'def'}, 'f00d')
        assert facts['passes'] == {'tokens:wiki': '<= 6.6'}
        # A run of an older version has no such record.
        (workdir / files.DATA).unlink()
        assert runs.read(workdir).facts['data'] == {'tokens:wiki': plan}
    (workdir / files.METRICS).write_text('{"split": "tra')
    with pytest.raises(UserError, match=r'metrics\.jsonl has no line of training'):
        runs.read(workdir)


def test_what_eval_py_measured_is_a_table(tmp_path):
    config = resolve(quickstart.get_config())
    rows = {
        'flash': [(5, 9.0, {}), (7, 2.0, {}), (7, 2.3, {'quantization': 'int8'}), (7, 2.2, {'quantization': 'int8'})],
        'narrow': [(7, 2.5, {})],
    }
    for name, measured in rows.items():
        config.model.expansion_factor = 1.5 if name == 'narrow' else 2.0
        (tmp_path / name).mkdir()
        files.write_json(tmp_path / name / files.CONFIG, files.config_to_dict(config))
        lines = [
            {'step': step, 'split': 'eval/valid', 'loss': loss, 'tokens': 100, 'context': 256, 'by_position': []}
            | ({'config': changed} if changed else {})
            for step, loss, changed in measured
        ]
        # By another evaluator.
        ranges = [{'first': 0, 'last': 0, 'loss': 3.0, 'tokens': 4}, {'first': 2, 'last': 3, 'loss': 1.5, 'tokens': 8}]
        row = {'step': 7, 'split': 'repetition/valid', 'loss': 2.0, 'new_loss': 3.0, 'context': 256}
        lines.insert(0, row | {'loss_by_distance': ranges})
        lines.append(row | {'split': 'eval/train', 'config': {'data.source': 'jsonl:/texts/books.jsonl'}})
        (tmp_path / name / files.EVAL).write_text(''.join(json.dumps(line) + '\n' for line in lines))
    final = {'step': 7, 'device': 'cpu', 'versions': {}, 'parameters': 9, 'flops_per_token': 1, 'data': {'a': 'b'}}
    files.write_json(tmp_path / 'flash' / files.FINAL, final | {'eval': {}})
    row = {'step': 7, 'split': 'train', 'loss': 1.0, 'tokens': 512, 'step_seconds': 0.1}
    (tmp_path / 'flash' / files.METRICS).write_text(json.dumps(row) + '\n')
    done = {'source': '/elsewhere/flash', 'step': 7, 'method': 'narrower', 'parameters': {'before': 9, 'after': 6}}
    files.write_json(tmp_path / 'narrow' / files.COMPRESSION, done)
    found = evaluated.find([tmp_path / 'flash', tmp_path / 'narrow'])
    made = report.make(found, Options(by=('point',), against='flash'))
    losses = {row.values['point']: row.mean.value for row in made.rows}
    assert losses == {'flash': 2.0, 'flash quantization=int8': 2.2, 'narrow': 2.5}
    assert [run.metrics['valid'].get('new_loss') for run in found] == [3.0, None, 3.0]
    assert found[0].curves == {'loss_by_distance': [[1.0, 4, 3.0], [3.5, 8, 1.5]]}
    assert tmp_path / 'table_by_distance.png' in figures.draw(made, tmp_path / 'table')
    narrow = found[-1].facts
    assert narrow['parameters'] == 6
    assert narrow['command'] == 'python scripts/compress.py --method=narrower --expansion_factor=1.5'
    # Where a text lay on the machine that measured says nothing.
    (other_text,) = evaluated.find([tmp_path / 'flash'], split='train')
    assert other_text.label == 'flash source=jsonl:books.jsonl'
    assert other_text.facts['command'] == 'python eval.py --config.data.source=jsonl:books.jsonl'
    (tmp_path / 'narrow' / files.EVAL).unlink()
    with pytest.raises(UserError, match='holds no measurement'):
        evaluated.find([tmp_path / 'narrow'])
    (tmp_path / 'flash').rename(tmp_path / 'other')
    with pytest.raises(UserError, match='flash, which is not there: its table needs both'):
        evaluated.find([tmp_path / 'narrow'])


def test_a_directory_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match='neither a run nor a sweep'):
        runs.find([tmp_path])


@pytest.mark.parametrize('damaged', ['{"points', '[]', '{"points": 3}'])
def test_a_sweep_that_cannot_be_read_is_refused(tmp_path, damaged):
    (tmp_path / 'sweep.json').write_text(damaged)
    with pytest.raises(UserError, match=r'sweep\.json cannot be read'):
        runs.find([tmp_path])
