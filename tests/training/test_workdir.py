import json
import math

import numpy as np
import pandas as pd
import pytest

from gau.errors import UserError
from gau.models.fields import GONE
from gau.training import workdir
from gau.training.config import default_config, resolve
from gau.training.metrics import MetricsWriter
from tests.training.tiny import tiny_config

CONFIG = resolve(tiny_config())


def claim(path, config=CONFIG):
    return workdir.claim(path, config)


def test_config_survives_json(tmp_path):
    workdir.write_json(tmp_path / 'config.json', workdir.config_to_dict(CONFIG))
    assert workdir.read_config(tmp_path) == CONFIG


def test_new_then_resumed_then_changed(tmp_path):
    with claim(tmp_path / 'run') as resuming:
        assert not resuming
        workdir.write_json(tmp_path / 'run' / 'config.json', workdir.config_to_dict(CONFIG))
    with claim(tmp_path / 'run') as resuming:
        assert resuming
    changed = CONFIG.copy_and_resolve_references()
    changed.seed = 1
    with pytest.raises(UserError, match=r'seed: 0 -> 1.*--fork'), claim(tmp_path / 'run', changed):
        pass


def test_another_mesh_is_the_same_run(tmp_path):
    workdir.write_json(tmp_path / 'config.json', workdir.config_to_dict(CONFIG))
    changed = CONFIG.copy_and_resolve_references()
    changed.mesh.data = 8
    with claim(tmp_path, changed) as resuming:
        assert resuming


@pytest.mark.parametrize(
    ('field', 'changed'),
    [('data.streams', 2), ('data.shuffle_window', 4096), ('model.chunk_size', 8), ('eval', None), ('evaluators', None)],
)
def test_a_run_from_before_a_field_existed_has_its_default(tmp_path, field, changed):
    # Fields whose default stands in default_config, is decided by other fields, or is a section.
    config = default_config()
    config.data.update({'context': 512, 'batch_size': 2})
    config = resolve(config)
    tree = workdir.config_to_dict(config)
    *sections, name = field.split('.')
    section, changed_config = tree, config.copy_and_resolve_references()
    changed_section = changed_config
    for key in sections:
        section, changed_section = section[key], changed_section[key]
    del section[name]
    workdir.write_json(tmp_path / 'config.json', tree)
    assert workdir.read_config(tmp_path) == config
    with claim(tmp_path, config) as resuming:
        assert resuming
    if changed is not None:
        changed_section[name] = changed
        with pytest.raises(UserError, match=rf'{field}: .* -> {changed}\)'), claim(tmp_path, changed_config):
            pass


def test_a_run_with_the_old_rules_of_weight_decay_goes_on(tmp_path):
    tree = workdir.config_to_dict(CONFIG)
    tree['optimizer']['weight_decay_rules'] = [['(^|/)(kernel|embedding)$', 1.0]]
    workdir.write_json(tmp_path / 'config.json', tree)
    assert workdir.read_config(tmp_path) == CONFIG
    with claim(tmp_path) as resuming:
        assert resuming


def test_a_run_from_before_the_start_of_the_bias_was_a_field_has_the_papers(tmp_path):
    tree = workdir.config_to_dict(CONFIG)
    assert tree['model']['relative_bias_init'] == 'mean'
    del tree['model']['relative_bias_init'], tree['model']['relative_bias_scale']
    workdir.write_json(tmp_path / 'config.json', tree)
    model = workdir.read_config(tmp_path).model
    assert (model.relative_bias_init, model.relative_bias_scale) == ('normal', None)


def test_a_run_with_a_field_that_is_none_any_more_is_another(tmp_path):
    tree = workdir.config_to_dict(CONFIG)
    tree['model']['wings'] = 2
    del tree['data']['streams']
    workdir.write_json(tmp_path / 'config.json', tree)
    with pytest.raises(UserError, match=r'\(model.wings: 2 -> absent\)'), claim(tmp_path):
        pass


@pytest.mark.parametrize('field', GONE)
def test_a_run_that_made_no_use_of_a_field_that_is_gone_goes_on(tmp_path, field):
    tree = workdir.config_to_dict(CONFIG)
    for unused in (GONE[field].unused, None):
        tree['model'][field] = unused
        workdir.write_json(tmp_path / 'config.json', tree)
        assert workdir.read_config(tmp_path) == CONFIG
        with claim(tmp_path) as resuming:
            assert resuming
    tree['model'][field] = 'used'
    workdir.write_json(tmp_path / 'config.json', tree)
    with pytest.raises(UserError, match=rf'\(model.{field}: used -> absent\)'), claim(tmp_path):
        pass


def test_a_run_that_used_a_field_that_is_gone_has_others_that_came_later(tmp_path):
    tree = workdir.config_to_dict(CONFIG)
    tree['model']['global_decay'] = 0.5
    del tree['model']['local_window']
    workdir.write_json(tmp_path / 'config.json', tree)
    model = workdir.read_config(tmp_path).model
    assert (model.global_decay, model.local_window) == (0.5, CONFIG.model.local_window)


def test_one_process_at_a_time(tmp_path):
    with claim(tmp_path), pytest.raises(UserError, match='another process'), claim(tmp_path):
        pass


def test_foreign_directories_are_refused_untouched(tmp_path):
    (tmp_path / 'thesis.tex').write_text('precious')
    with pytest.raises(UserError, match='not empty and holds no run'), claim(tmp_path):
        pass
    assert [entry.name for entry in tmp_path.iterdir()] == ['thesis.tex']
    with pytest.raises(UserError, match='not a directory'), claim(tmp_path / 'thesis.tex'):
        pass


def test_unreadable_run_is_one_line(tmp_path):
    with pytest.raises(UserError, match='holds no run'):
        workdir.read_config(tmp_path)
    (tmp_path / 'config.json').write_text('{"seed": ')
    with pytest.raises(UserError, match='not valid JSON'):
        workdir.read_config(tmp_path)


def strictly(text):
    """What jq and JavaScript make of a line: words that are no JSON are refused."""

    def refuse(word):
        raise AssertionError(f'{word} is no JSON')

    return json.loads(text, parse_constant=refuse)


def test_numbers_that_are_not_finite_are_json_and_are_read_as_numbers(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    # As earlier versions wrote.
    path.write_text('{"step": 1, "split": "eval/valid", "loss": NaN, "perplexity": Infinity}\n')
    writer = MetricsWriter(tmp_path, first_step=1)
    written = {
        'loss': math.nan,
        'perplexity': math.inf,
        'logit': -math.inf,
        'tokens': 3,
        'mfu': None,
        'all': [math.nan],
    }
    writer.write(2, 'eval/valid', written)
    writer.close()
    line = strictly(path.read_text().splitlines()[1])
    assert [line[name] for name in ('loss', 'perplexity', 'logit', 'all')] == ['NaN', 'Infinity', '-Infinity', ['NaN']]
    old, new = workdir.read_metrics(path)
    assert math.isnan(old['loss'])
    assert old['perplexity'] == math.inf
    assert str(new) == str({'step': 2, 'split': 'eval/valid', **written})
    table = pd.read_json(path.open(), lines=True)
    assert np.isnan(table['loss'].iloc[1])
    assert np.isinf(table['perplexity'].iloc[1])
    workdir.write_json(tmp_path / 'final.json', {'step': 2, 'eval': {'valid': written}})
    strictly((tmp_path / 'final.json').read_text())
    assert str(workdir.read_final(tmp_path)['eval']['valid']) == str(written)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / 'metrics.jsonl'
    rows = [{'step': s, 'split': split} for s in (1, 2, 3) for split in ('train', 'eval/valid')]
    text = ''.join(json.dumps(row) + '\n' for row in rows)
    path.write_text(text + '{"step": 4, "spl')
    assert workdir.read_metrics(path) == rows
    workdir.truncate_metrics(path, last_step=2, keep_evaluations=True)
    assert workdir.read_metrics(path) == rows[:4]
    workdir.truncate_metrics(path, last_step=2, keep_evaluations=False)
    assert workdir.read_metrics(path) == rows[:3]
    assert path.read_text().endswith('\n')
