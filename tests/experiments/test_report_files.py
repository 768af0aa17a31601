"""What a report of made-up runs writes and finds: pages, figures, kept lines, evaluations."""

import csv
import json
import math

import pytest

from configs import quickstart
from gau.errors import UserError
from gau.experiments import evaluated, figures, publish, report, runs, statistics
from gau.experiments.report import Options
from gau.experiments.runs import Run
from gau.training import workdir as files
from gau.training.config import resolve
from tests.experiments.made_up import made_up, models
from tests.programs import call


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
    assert ' nan ± nan |' in publish.write(made, found, tmp_path / 'chunks')
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
    heads = [head.strip() for head in text.splitlines()[0].split('|')[1:-1]]
    assert heads == ['model', 'valid loss', 'difference', 'reached']
    assert 'and time' not in text
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
    assert publish.renew(kept) == 'made again'
    assert publish.check(kept) == publish.renew(kept) == publish.SAME
    assert page.read_text().endswith('What it says: smaller is better.\n')
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
        lines.append(row | {'split': 'repetition/valid', 'loss': 1.8, 'context': 512})
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
    longer = {'flash context=512': 1.8, 'narrow context=512': 1.8}
    assert losses == {'flash': 2.0, 'flash quantization=int8': 2.2, 'narrow': 2.5} | longer
    assert [run.metrics['valid'].get('new_loss') for run in found] == [3.0, None, 3.0, 3.0, 3.0]
    assert found[2].facts['command'] == 'python eval.py --contexts=512'
    assert found[0].curves == {'loss_by_distance': [[1.0, 4, 3.0], [3.5, 8, 1.5]]}
    assert tmp_path / 'table_by_distance.png' in figures.draw(made, tmp_path / 'table')
    narrow = found[3].facts
    assert narrow['parameters'] == 6
    assert narrow['command'] == 'python scripts/compress.py --method=narrower --expansion_factor=1.5'
    # What one evaluator says of the same split.
    alone = evaluated.find([tmp_path / 'flash'], split='repetition/valid')
    assert [(run.label, run.metrics['repetition/valid']['loss']) for run in alone] == [
        ('flash', 2.0),
        ('flash context=512', 1.8),
    ]
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
