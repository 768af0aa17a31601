import json
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import manifest, sources
from gau.errors import UserError
from tests.data.conftest import make_config


@pytest.mark.parametrize('objective', ['lm', 'mlm'])
@pytest.mark.parametrize(
    'fields',
    [
        {},
        {'source': 'text:/x/*.txt'},
        {'source': 'jsonl:/x', 'valid_source': 'jsonl:/y', 'text_field': 'body'},
        {'source': 'mixture', 'mixture': ((1, 'embedded'), (0.5, 'text:/x'))},
    ],
)
def test_resolving_twice_changes_nothing(objective, fields):
    once = make_config(objective, **fields)
    assert data_config.resolve(once, objective=objective) == once
    # As read back from config.json, where tuples are lists.
    assert data_config.sources(once) == data_config.sources(data_config.resolve(once, objective=objective))


def test_defaults_depend_on_objective_and_source():
    assert make_config().packing == 'concat'
    assert make_config('mlm').packing == 'first_fit'
    assert make_config().text_unit is None
    assert make_config(source='text:x').text_unit == 'file'
    assert make_config(source='text:x', valid_source='text:y').holdout_every is None
    assert make_config('mlm', mlm_masking='span').mlm.span_max == 10


@pytest.mark.parametrize(
    ('fields', 'default'),
    [
        ({'source': 'text:x', 'valid_source': 'jsonl:y', 'text_field': 'content'}, ('text_unit', 'file')),
        ({'source': 'text:x', 'test_source': 'jsonl:y', 'text_field': 'content'}, ('holdout_every', 50)),
        ({'source': 'jsonl:x', 'valid_source': 'text:y', 'text_unit': 'line'}, ('bad_lines', 'error')),
        ({'source': 'jsonl:x', 'valid_source': 'text:y'}, ('text_unit', 'file')),
    ],
)
def test_fields_speak_to_the_files_of_valid_and_test_too(fields, default):
    config = make_config(**fields)
    assert config[default[0]] == default[1]
    assert data_config.resolve(config, objective='lm') == config


@pytest.mark.parametrize('spelt', [None, 'None', ''])
def test_no_tokenizer_means_bytes_or_that_of_the_shards(spelt, tmp_path):
    assert make_config(tokenizer=spelt).tokenizer == 'bytes'
    contents = {'format': manifest.FORMAT, 'tokenizer': {'spec': 'sentencepiece:tokenizer.model'}}
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    prepared = make_config(source=f'tokens:{tmp_path}', tokenizer=spelt)
    assert prepared.tokenizer == f'sentencepiece:{tmp_path}/tokenizer.model'


@pytest.mark.parametrize(
    ('fields', 'found'),
    [
        ({'source': 'text:a/**/*.txt,./b,/c,../d'}, {'source': 'text:HERE/a/**/*.txt,HERE/b,/c,HERE/../d'}),
        (
            {'source': 'jsonl:x', 'valid_source': 'text:y', 'test_source': 'jsonl:/z'},
            {'source': 'jsonl:HERE/x', 'valid_source': 'text:HERE/y', 'test_source': 'jsonl:/z'},
        ),
        ({'source': 'text:~/x'}, {'source': 'text:HOME/x'}),
        ({'tokenizer': 'sentencepiece:m.model'}, {'source': 'embedded', 'tokenizer': 'sentencepiece:HERE/m.model'}),
        ({'tokenizer': 'huggingface:a/t.json'}, {'tokenizer': 'huggingface:HERE/a/t.json'}),
        ({'source': 'tfds:toy/en', 'tokenizer': 'bytes'}, {'source': 'tfds:toy/en', 'tokenizer': 'bytes'}),
        ({'source': 'tokens:made'}, {'source': 'tokens:HERE/made', 'tokenizer': 'sentencepiece:HERE/made/t.model'}),
        (
            {'source': 'mixture', 'mixture': ((1, 'text:x'), (2.5, 'embedded'), (1, 'tokens:./made'))},
            {
                'mixture': ((1, 'text:HERE/x'), (2.5, 'embedded'), (1, 'tokens:HERE/made')),
                'tokenizer': 'sentencepiece:HERE/made/t.model',
            },
        ),
    ],
)
def test_paths_become_absolute_and_stay_so_elsewhere(tmp_path, monkeypatch, fields, found):
    contents = {'format': manifest.FORMAT, 'tokenizer': {'spec': 'sentencepiece:t.model'}}
    (tmp_path / 'made').mkdir()
    (tmp_path / 'made' / manifest.FILE).write_text(json.dumps(contents))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '/home/me')
    config = make_config(**fields)
    assert {
        name: json.loads(json.dumps(config[name]).replace(str(tmp_path), 'HERE').replace('/home/me', 'HOME'))
        for name in found
    } == json.loads(json.dumps(found))
    monkeypatch.chdir('/')
    # As a resumed or evaluated run reads it back, where tuples are lists.
    again = data_config.resolve(ConfigDict(json.loads(config.to_json())), objective='lm')
    assert again.to_json() == config.to_json()
    assert data_config.resolve(config, objective='lm') == config


def test_the_directory_itself_is_no_glob(tmp_path, monkeypatch):
    for name in ('a[b]*', 'a,b'):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'x.txt').write_text('text\n\ntext')
        monkeypatch.chdir(tmp_path / name)
        config = make_config(source='text:*.txt', text_unit='line')
        assert len(sources.open_split(config, 'train')[0]) == 1


@pytest.mark.parametrize(
    ('objective', 'fields', 'message'),
    [
        ('lm', {'source': 'embeded'}, 'did you mean "embedded"'),
        ('lm', {'source': 'json:x'}, 'did you mean "jsonl"'),
        ('lm', {'source': 'text'}, 'must be "text:..."'),
        ('lm', {'source': 'text:'}, 'lacks what stands behind the colon'),
        ('lm', {'tokenizer': 'byte'}, 'did you mean "bytes"'),
        ('lm', {'packing': 'firstfit'}, 'did you mean "first_fit"'),
        ('lm', {'shuffle': 'row'}, 'did you mean "rows"'),
        ('lm', {'source': 'text:x', 'text_unit': 'lines'}, 'did you mean "line"'),
        ('lm', {'source': 'text:x', 'bad_lines': 'skipp'}, 'did you mean "skip"'),
        (
            'lm',
            {'text_unit': 'line'},
            'text_unit=line does nothing with data.source="embedded": leave it out, .* of text sources',
        ),
        ('lm', {'source': 'text:x', 'text_field': 'body'}, 'text_field=body does nothing .* of jsonl and tfds sources'),
        ('lm', {'valid_source': 'text:x'}, 'valid_source=text:.* does nothing .* of text and jsonl and tokens sources'),
        ('lm', {'source': 'text:x', 'valid_source': 'embedded'}, 'must be text:GLOB, jsonl:GLOB or tokens:DIR'),
        ('lm', {'source': 'text:x', 'valid_source': 'text:y', 'holdout_every': 9}, 'has no use beside'),
        ('lm', {'source': 'text:x', 'holdout_every': 1}, 'at least 2, or 0 to hold nothing out'),
        ('lm', {'context': 0}, 'data.context=0 must be at least 1'),
        ('lm', {'shuffle': 'documents', 'shuffle_window': 9999}, 'is for data.shuffle="rows"'),
        ('lm', {'shuffle_window': 3}, 'less than one row'),
        ('lm', {'packing': 'document', 'attend_across_documents': True}, 'has no meaning'),
        ('lm', {'mixture': ((1, 'embedded'),)}, 'is for data.source="mixture"'),
        ('lm', {'source': 'mixture'}, 'needs data.mixture'),
        ('lm', {'source': 'mixture', 'mixture': ((0, 'embedded'),)}, 'weight above 0'),
        ('lm', {'source': 'mixture', 'mixture': (0.5, 'embedded')}, 'must be a pair'),
        ('lm', {'source': 'mixture', 'mixture': ((1, 'mixture'),)}, 'cannot hold a mixture'),
        ('lm', {'mlm_rate': 0.3}, 'data.mlm.rate does nothing for the objective lm'),
        ('mlm', {'mlm_rate': 0.0}, 'data.mlm.rate=0.0'),
        ('mlm', {'mlm_masking': 'word'}, 'did you mean "whole_word"'),
        ('mlm', {'mlm_mask_share': 0.8, 'mlm_random_share': 0.3}, 'must be shares of one'),
        ('mlm', {'mlm_mask_share': float('nan')}, 'must be shares of one'),
        ('mlm', {'mlm_masking': 'span', 'mlm_span_mean': float('inf')}, 'must be at least 1, the mean finite'),
        ('lm', {'source': 'mixture', 'mixture': ((float('nan'), 'embedded'),)}, 'weight above 0'),
        ('mlm', {'mlm_span_max': 3}, 'is for data.mlm.masking="span"'),
        ('clm', {}, 'objective="clm" is unknown'),
        ('lm', {'source': 'tokens:/nowhere/at/all'}, 'no such directory'),
    ],
)
def test_what_makes_no_sense_is_refused(objective, fields, message):
    with pytest.raises(UserError, match=message.replace('(', r'\(')):
        make_config(objective, **fields)


def test_reading_a_config_stays_light():
    heavy = "{'grain', 'jax', 'sentencepiece', 'tokenizers', 'tensorflow_datasets', 'numpy'}"
    code = f'import sys, gau.data.config; print(sorted({heavy} & set(sys.modules)))'
    # ml_collections itself brings NumPy.
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd='.')
    assert result.stdout.strip() in ('[]', "['numpy']")
