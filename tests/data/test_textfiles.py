import bz2
import gzip
import itertools
import json
import lzma
import sys

import pytest
import zstandard

from gau.data import pipeline, sources, tokenizers
from gau.data.documents import Texts, hold_out
from gau.data.textfiles import TextFiles
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts, write_jsonl


def read(globs, tmp_path, unit='file', field=None, bad='error'):
    files = TextFiles(str(globs), unit=unit, field=field, bad=bad, cache_dir=str(tmp_path / 'cache'))
    documents = [files[i] for i in range(len(files))]
    return [document.text for document in documents if document], files


TEXT = '\ufefffirst line\r\nstill first\r\n\r\n  \t\r\nsecond\n\n\nthird é\nend'


@pytest.mark.parametrize(
    ('unit', 'expected'),
    [
        ('file', ['first line\r\nstill first\r\n\r\n  \t\r\nsecond\n\n\nthird é\nend']),
        ('line', ['first line', 'still first', 'second', 'third é', 'end']),
        ('paragraph', ['first line\r\nstill first', 'second', 'third é\nend']),
    ],
)
def test_units(tmp_path, unit, expected):
    (tmp_path / 'a.txt').write_bytes(TEXT.encode())
    assert read(tmp_path / 'a.txt', tmp_path, unit)[0] == expected


def test_files_come_sorted_from_several_globs(tmp_path):
    (tmp_path / 'deep').mkdir()
    for name in ('b.txt', 'a.txt', 'deep/c.txt', 'other.md'):
        (tmp_path / name).write_text(name)
    assert read(f'{tmp_path}/**/*.txt,{tmp_path}/*.md', tmp_path)[0] == ['a.txt', 'b.txt', 'deep/c.txt', 'other.md']


COMPRESSED = [('gz', gzip.compress), ('bz2', bz2.compress), ('xz', lzma.compress), ('zst', zstandard.compress)]


@pytest.mark.parametrize(('suffix', 'compress'), COMPRESSED)
def test_compressed_files_are_the_same_and_follow_changes(tmp_path, suffix, compress):
    texts = make_texts(20)
    plain = write_jsonl(tmp_path / 'plain.jsonl', texts)
    packed = tmp_path / f'packed.jsonl.{suffix}'
    packed.write_bytes(compress(plain.read_bytes()))
    assert read(packed, tmp_path, 'json', 'text')[0] == texts
    assert len(list((tmp_path / 'cache').iterdir())) == 1
    packed.write_bytes(compress(plain.read_bytes()[: plain.read_bytes().index(b'\n') + 1]))
    assert read(packed, tmp_path, 'json', 'text')[0] == texts[:1]
    packed.write_bytes(compress(plain.read_bytes())[:-9])
    with pytest.raises(UserError, match=rf'packed.jsonl.{suffix}: cannot decompress: it ends in the middle'):
        read(packed, tmp_path, 'json', 'text')
    packed.write_bytes(b'none of it')
    with pytest.raises(UserError, match=rf'packed.jsonl.{suffix}: cannot decompress'):
        read(packed, tmp_path, 'json', 'text')
    assert not list((tmp_path / 'cache').glob('.part-*'))


def test_zst_without_its_library_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, 'zstandard', None)
    (tmp_path / 'a.txt.zst').write_bytes(b'x')
    with pytest.raises(UserError, match='pip install zstandard'):
        read(tmp_path / 'a.txt.zst', tmp_path)


def test_large_files_keep_their_index(tmp_path, monkeypatch):
    monkeypatch.setattr('gau.data.textfiles._LARGE', 100)
    monkeypatch.setattr('gau.data.textfiles._BLOCK', 64)
    texts = make_texts(30)
    path = write_jsonl(tmp_path / 'a.jsonl', texts)
    assert read(path, tmp_path, 'json', 'text')[0] == texts
    (index,) = (tmp_path / 'cache').glob('*.npy')
    monkeypatch.setattr('gau.data.textfiles.TextFiles._scan', None)
    assert read(path, tmp_path, 'json', 'text')[0] == texts
    assert index.stat().st_size == 128 + 30 * 16


GOOD = '{"text": "fine"}'


@pytest.mark.parametrize(
    ('line', 'message'),
    [
        (b'{"text": broken}', 'not JSON'),
        (b'[1, 2]', 'one JSON object a line is expected, not list'),
        (b'[', 'not JSON, of which one object a line is expected'),
        (b'{"text": {"a": 1}}', 'the field "text" is dict, not text'),
        (b'{"body": "x", "id": 1}', r'no field "text" \(data.text_field\) among body, id'),
        (b'{"text": 3}', 'the field "text" is int, not text'),
        (b'{"text": "\xff"}', r'not UTF-8: .*0xff'),
    ],
)
@pytest.mark.parametrize('block', [16, 1 << 24])
def test_bad_lines_are_named_or_skipped(tmp_path, monkeypatch, line, message, block):
    monkeypatch.setattr('gau.data.textfiles._BLOCK', block)
    path = tmp_path / 'a.jsonl'
    path.write_bytes(b'\n'.join([GOOD.encode(), b'', line, GOOD.encode()]))
    with pytest.raises(UserError, match=rf'a.jsonl:3: {message}.*data.bad_lines="skip"'):
        read(path, tmp_path, 'json', 'text')
    texts, files = read(path, tmp_path, 'json', 'text', bad='skip')
    assert texts == ['fine', 'fine']
    assert files.skipped == {1}


@pytest.mark.parametrize('threads', [0, 2])
def test_a_bad_line_found_while_training_is_a_user_error(tmp_path, threads):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(100))
    lines = path.read_text('utf-8').splitlines()
    lines[41] = '{"text": 1}'
    path.write_text('\n'.join(lines), 'utf-8')
    config = make_config(source=f'jsonl:{path}', read_threads=threads, prefetch_batches=threads)
    iterator = pipeline.train_iterator(config, objective='lm', tokenizer=tokenizers.load('bytes'), seed=0)
    with pytest.raises(UserError, match=r'a.jsonl:42: the field "text" is int'):
        list(itertools.islice(iterator, 1000))


def test_a_misnamed_field_shows_at_once(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(3))
    with pytest.raises(UserError, match=r'a.jsonl:1: no field "txt"'):
        sources.open_split(make_config(source=f'jsonl:{path}', text_field='txt'), 'train')


def test_missing_empty_and_endless_files_are_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r'no file matches ".*none\*.txt"'):
        read(tmp_path / 'none*.txt', tmp_path)
    with pytest.raises(UserError, match=r'is a directory: say which files'):
        read(tmp_path, tmp_path)
    (tmp_path / 'empty.txt').touch()
    with pytest.raises(UserError, match='no document in 1 files, all of them are empty'):
        read(tmp_path / 'empty.txt', tmp_path)
    (tmp_path / 'latin.txt').write_bytes('line\ncaf\xe9\n'.encode('latin-1'))
    with pytest.raises(UserError, match=r'latin.txt:2: not UTF-8'):
        read(tmp_path / 'latin.txt', tmp_path)
    monkeypatch.setattr('gau.data.textfiles._LONGEST_DOCUMENT', 10)
    (tmp_path / 'long.txt').write_text('long ' * 10)
    with pytest.raises(UserError, match=r'choose data.text_unit="paragraph"'):
        read(tmp_path / 'long.txt', tmp_path)


def test_an_unwritable_cache_is_said(tmp_path):
    (tmp_path / 'cache').touch()
    (tmp_path / 'a.txt.gz').write_bytes(gzip.compress(b'text'))
    with pytest.raises(UserError, match=r'data.cache_dir: cannot write'):
        read(tmp_path / 'a.txt.gz', tmp_path)


@pytest.mark.parametrize(('count', 'every'), [(100, 7), (7, 7), (5, 7), (2, 50), (1000, 2)])
def test_hold_out_parts_without_overlap(count, every):
    texts = [str(i) for i in range(count)]
    parts = {split: hold_out(Texts(texts), every=every, split=split) for split in ('train', 'valid')}
    found = {split: [part[i].text for i in range(len(part))] for split, part in parts.items()}
    assert sorted(found['train'] + found['valid'], key=int) == texts
    assert len(found['valid']) == max(1, count // every)


@pytest.mark.parametrize('text', ['one line\n' * 200, 'no line break at all ' * 50])
def test_a_lone_document_gives_its_tail(text):
    train, valid = (hold_out(Texts([text]), every=10, split=split)[0].text for split in ('train', 'valid'))
    assert train + valid == text
    assert 0.05 < len(valid) / len(text) <= 0.1


def test_separate_validation_and_test_files(tmp_path):
    for name in ('train', 'valid', 'test'):
        (tmp_path / f'{name}.jsonl').write_text(json.dumps({'text': name}) + '\n')
    config = make_config(
        source=f'jsonl:{tmp_path}/train.jsonl',
        valid_source=f'jsonl:{tmp_path}/valid.jsonl',
        test_source=f'jsonl:{tmp_path}/test.jsonl',
    )
    assert sources.splits(config) == ['train', 'valid', 'test']
    for split in sources.splits(config):
        (documents,) = sources.open_split(config, split)
        assert [documents[i].text for i in range(len(documents))] == [split]
