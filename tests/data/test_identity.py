"""What tells on resume that the data is no longer the same."""

import json
import os
import platform

import pytest

from gau.data import manifest, sources
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts, write_jsonl


def test_changed_files_change_it_and_nothing_else_does(tmp_path):
    for name in 'ab':
        write_jsonl(tmp_path / f'{name}.jsonl', make_texts(3))
    config = make_config(source=f'jsonl:{tmp_path}/?.jsonl')
    before = sources.identity(config)
    assert before == sources.identity(config)
    assert json.loads(json.dumps(before)) == before
    assert list(before) == [config.source]
    seen = [before]
    (tmp_path / 'b.jsonl').write_bytes((tmp_path / 'b.jsonl').read_bytes() + b'\n')
    seen.append(sources.identity(config))
    os.utime(tmp_path / 'a.jsonl', ns=(1, 1))
    seen.append(sources.identity(config))
    (tmp_path / 'c.jsonl').write_text('{"text": "one more"}\n')
    seen.append(sources.identity(config))
    assert len({value for each in seen for value in each.values()}) == 4
    (tmp_path / 'b.jsonl').unlink()
    (tmp_path / 'a.jsonl').unlink()
    (tmp_path / 'c.jsonl').unlink()
    with pytest.raises(UserError, match='no file matches'):
        sources.identity(config)


def test_every_source_has_a_line(corpus, tmp_path):
    write_jsonl(tmp_path / 'v.jsonl', make_texts(2))
    mixture = ((1, 'embedded'), (1, corpus['tokens']), (2, corpus['jsonl']))
    config = make_config(source='mixture', mixture=mixture, valid_source=f'jsonl:{tmp_path}/v.jsonl')
    found = sources.identity(config)
    assert list(found) == ['embedded', corpus['tokens'], corpus['jsonl'], config.valid_source]
    assert found['embedded'].startswith(f'Python {platform.python_version()}, ')
    assert len(set(found.values())) == 4


def test_tokens_prepared_anew_change_it(tmp_path):
    contents = {'format': manifest.FORMAT, 'tokenizer': {'spec': 'bytes'}, 'splits': {'train': {'tokens': 1}}}
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    config = make_config(source=f'tokens:{tmp_path}')
    before = sources.identity(config)
    contents['splits']['train']['tokens'] = 2
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    assert sources.identity(config) != before
