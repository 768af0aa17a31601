"""Files as users have them: cut short, doubled, of another kind or name. They are read whole and once, or refused."""

import io
import json
import os
import pathlib
import tarfile
import zipfile

import pytest
import zstandard

from gau import errors
from gau.data import globs, plain, report, sources
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts, write_jsonl
from tests.data.test_textfiles import COMPRESSED, read

TEXT = ''.join(f'line {i} of a text\n' for i in range(4000))


@pytest.fixture(autouse=True)
def every_warning():
    """Warnings are said once in a process, and tests share one."""
    errors.warn.cache_clear()


@pytest.mark.parametrize(('suffix', 'compress'), COMPRESSED)
def test_streams_behind_one_another_are_all_read(tmp_path, suffix, compress):
    (tmp_path / f'a.txt.{suffix}').write_bytes(compress(b'one ') + compress(b'two ' * 50_000) + compress(b'three'))
    assert read(tmp_path / f'a.txt.{suffix}', tmp_path)[0] == ['one ' + 'two ' * 50_000 + 'three']


@pytest.mark.parametrize(('suffix', 'compress'), COMPRESSED)
@pytest.mark.parametrize('share', [0.02, 0.5, 0.98])
def test_a_stream_cut_anywhere_is_refused(tmp_path, suffix, compress, share):
    path = tmp_path / f'a.txt.{suffix}'
    whole, second = compress(b'whole'), compress(os.urandom(300_000).hex().encode())
    for contents in (second, whole + second):
        path.write_bytes(contents[: len(contents) - len(second) + max(8, int(share * len(second)))])
        with pytest.raises(UserError, match=rf'a.txt.{suffix}: cannot decompress: it ends in the middle'):
            read(path, tmp_path)


@pytest.mark.parametrize(('suffix', 'compress'), COMPRESSED)
def test_bytes_behind_the_last_stream_are_passed_over_with_a_warning(tmp_path, capsys, suffix, compress):
    (tmp_path / f'zeros.txt.{suffix}').write_bytes(compress(b'text') + bytes(1000))
    (tmp_path / f'more.txt.{suffix}').write_bytes(compress(b'text') + bytes(3) + b'signature' * 20_000)
    assert read(tmp_path / f'zeros.txt.{suffix}', tmp_path)[0] == ['text']
    assert capsys.readouterr().err == ''
    assert read(tmp_path / f'more.txt.{suffix}', tmp_path)[0] == ['text']
    assert f'more.txt.{suffix}: 180000 bytes behind the compressed data are passed over' in capsys.readouterr().err


def test_frames_that_zstd_passes_over_are_passed_over(tmp_path):
    frame = bytes([0x53, 0x2A, 0x4D, 0x18]) + (5).to_bytes(4, 'little') + b'index'
    (tmp_path / 'a.txt.zst').write_bytes(
        frame + zstandard.compress(b'one ') + frame + zstandard.compress(b'two') + frame
    )
    assert read(tmp_path / 'a.txt.zst', tmp_path)[0] == ['one two']


@pytest.mark.parametrize(('suffix', 'compress'), COMPRESSED)
def test_suffixes_in_capitals_are_suffixes(tmp_path, suffix, compress):
    (tmp_path / f'A.TXT.{suffix.upper()}').write_bytes(compress(b'text'))
    assert read(tmp_path / f'A.TXT.{suffix.upper()}', tmp_path)[0] == ['text']


def test_every_file_counts_once(tmp_path):
    site = tmp_path / 'site'
    (site / 'deep').mkdir(parents=True)
    for name in ('a', 'b', 'deep/c'):
        (site / f'{name}.txt').write_text(name)
    for name, target in (('again', '.'), ('deep/up', '..'), ('deep/again', '../again'), ('z.txt', 'a.txt')):
        os.symlink(target, site / name)
    (tmp_path / 'link').symlink_to(site)
    names = [str(site / f'{name}.txt') for name in ('a', 'b', 'deep/c')]
    for pattern in ('site/**/*.txt', 'link/**', '**/*.txt', 'site/*.txt,site/deep/*,site/**/*.txt,link/a.txt'):
        found = globs.expand(','.join(str(tmp_path / part) for part in pattern.split(',')))
        assert [os.path.realpath(name) for name in found] == names, pattern
    assert globs.expand(f'{site}/**/*.txt') == names
    config = make_config(source=f'text:{site}/**/*.txt,{tmp_path}/link/*.txt', holdout_every=2)
    assert [len(sources.open_split(config, split)[0]) for split in ('train', 'valid')] == [2, 1]
    assert sources.identity(config) == {config.source: sources.identity_of(config, f'text:{site}/**/*.txt')}


def test_a_directory_behind_a_link_is_read(tmp_path):
    (tmp_path / 'disk' / 'part').mkdir(parents=True)
    (tmp_path / 'disk' / 'part' / 'a.txt').write_text('text')
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'corpus').symlink_to(tmp_path / 'disk')
    assert globs.expand(f'{tmp_path}/data/**/*.txt') == [f'{tmp_path}/data/corpus/part/a.txt']


def test_globs_mean_what_they_mean_to_glob(tmp_path, monkeypatch):
    import glob

    monkeypatch.chdir(pathlib.Path(__file__).parents[2])
    for pattern in (
        'gau/**/*.py',
        '**/*.md',
        'gau/data/*.py',
        './gau/**/k*/*.py',
        'docs/**',
        'gau/**/data/**/*.py',
        'g*/**/t*',
    ):
        expected = sorted({name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name)})
        assert globs.expand(pattern) == expected, pattern


@pytest.mark.parametrize(
    'name',
    ['a[1].txt', 'a,b.txt', 'a [v2]/b.txt', 'a,b/c,d[x].txt', 'a, b, c.txt', '[draft] notes, 2.txt', 'what?.txt'],
)
def test_names_with_brackets_and_commas(tmp_path, monkeypatch, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text('text')
    (tmp_path / 'other.txt').write_text('other')
    monkeypatch.chdir(tmp_path)
    for source in (f'text:{name}', f'text:{tmp_path}/{name}'):
        (documents,) = sources.open_split(make_config(source=f'{source},other.txt', text_unit='line'), 'train')
        assert [documents[i].text for i in range(len(documents))] == ['text']
    assert globs.expand(f'{name},other.txt') == [name, 'other.txt']
    assert globs.expand(f'other.txt,{name}') == ['other.txt', name]
    # What is a glob stays one.
    for digit in '12':
        (tmp_path / f'c{digit}.txt').write_text(digit)
    assert globs.expand('c[12].txt') == ['c1.txt', 'c2.txt']
    with pytest.raises(UserError, match='no file matches "none"'):
        globs.expand('none,other.txt')


def tar(path):
    with tarfile.open(path, 'w:gz' if path.name.endswith('gz') else 'w') as archive:
        info = tarfile.TarInfo('a.txt')
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT.encode()))


def zipped(path):
    with zipfile.ZipFile(path, 'w') as archive:
        archive.writestr('a.txt', TEXT)


@pytest.mark.parametrize('bad', ['error', 'skip'])
@pytest.mark.parametrize(
    ('name', 'contents', 'looks_like'),
    [
        ('a.tar', tar, 'a tar archive: unpack it'),
        ('a.tar.gz', tar, 'a tar archive: unpack it'),
        ('a.zip', zipped, 'a zip archive: unpack it'),
        ('a.txt', TEXT.encode('utf-16-le'), 'text in UTF-16LE: convert it, as by iconv -f UTF-16LE -t UTF-8'),
        ('a.txt', TEXT.encode('utf-16-be'), 'text in UTF-16BE'),
        ('a.txt', TEXT.encode('utf-16'), 'text in UTF-16: convert it'),
        ('a.txt', TEXT.encode('utf-32'), 'text in UTF-32'),
        ('a.txt', '漢字'.encode('utf-16') * 9, 'text in UTF-16'),
        ('a.jsonl', json.dumps({'text': 'x'}).encode('utf-16-le') * 9, 'text in UTF-16LE'),
        ('a.txt', b'PAR1' + bytes(range(200)) * 50, 'a Parquet file'),
        ('a.txt', b'%PDF-1.7\n%\xe2\xe3\xcf\xd3\n' * 50, 'a PDF document'),
        ('a.txt', dict(COMPRESSED)['gz'](TEXT.encode()), r'a compressed file: call it \*.gz'),
        ('a.txt', dict(COMPRESSED)['zst'](TEXT.encode()), r'a compressed file: call it \*.zst'),
        ('a.txt', b'text and then \x00\x01\x02\x03' * 99, 'binary data'),
    ],
)
def test_what_is_no_text_is_named(tmp_path, bad, name, contents, looks_like):
    path = tmp_path / name
    if callable(contents):
        contents(path)
    else:
        path.write_bytes(contents)
    for unit, field in (('file', None), ('line', None), ('json', 'text')):
        with pytest.raises(UserError, match=rf'{name}: no UTF-8 text, it looks like {looks_like}'):
            read(path, tmp_path, unit, field, bad)


@pytest.mark.parametrize(
    'text', ['PAR1 is where we meet', 'Rar!', '%PDF- is how it begins', 'BZh', '漢字' * 4000, '7z', 'é' * 4000]
)
def test_text_that_begins_like_something_else_is_text(tmp_path, text):
    (tmp_path / 'a.txt').write_text(text, encoding='utf-8')
    assert read(tmp_path / 'a.txt', tmp_path)[0] == [text]


def test_a_nul_further_on_is_a_bad_document(tmp_path):
    (tmp_path / 'a.txt').write_text(TEXT + 'one \0 byte\n' + 'end\n')
    with pytest.raises(UserError, match=r'a.txt:4001: a NUL byte, .*data.bad_lines="skip" leaves'):
        read(tmp_path / 'a.txt', tmp_path, 'line')
    texts, files = read(tmp_path / 'a.txt', tmp_path, 'line', bad='skip')
    assert texts == [*TEXT.splitlines(), 'end']
    assert files.skipped == {4000}
    # An escaped one is up to the text.
    (tmp_path / 'a.jsonl').write_text('{"text": "a\\u0000b"}\n')
    assert read(tmp_path / 'a.jsonl', tmp_path, 'json', 'text')[0] == ['a\0b']


def test_an_empty_file_among_many_is_no_matter(tmp_path, capsys):
    for name, text in (('a', 'one'), ('b', ''), ('c', 'two')):
        (tmp_path / f'{name}.txt').write_text(text)
    assert read(tmp_path / '?.txt', tmp_path)[0] == ['one', 'two']
    assert capsys.readouterr().err == f'warning: {tmp_path}/b.txt: the file is empty\n'
    with pytest.raises(UserError, match='all of them are empty'):
        read(tmp_path / 'b.txt', tmp_path)
    assert capsys.readouterr().err == ''


def test_skipped_documents_are_said(tmp_path, capsys):
    (tmp_path / 'a.jsonl').write_text('{"text": "one"}\n{"text": null}\n')
    read(tmp_path / 'a.jsonl', tmp_path, 'json', 'text', bad='skip')
    assert 'a.jsonl:2: the field "text" is NoneType, not text: skipped, 1 so far' in capsys.readouterr().err


def test_a_field_within_another(tmp_path):
    rows = [
        {'meta': {'text': 'deep', 'n': 1}},
        {'meta.text': 'flat', 'meta': 3},
        {'meta': {'text.en': 'x', 'text': 'y'}},
    ]
    (tmp_path / 'a.jsonl').write_text('\n'.join(map(json.dumps, rows)))
    assert read(tmp_path / 'a.jsonl', tmp_path, 'json', 'meta.text')[0] == ['deep', 'flat', 'y']
    with pytest.raises(UserError, match=r'a.jsonl:1: no field "meta.txt" \(data.text_field\) among meta'):
        read(tmp_path / 'a.jsonl', tmp_path, 'json', 'meta.txt')


@pytest.mark.parametrize('layout', [{}, {'indent': 1}])
def test_an_array_is_no_json_lines(tmp_path, layout):
    (tmp_path / 'a.jsonl').write_text(json.dumps([{'text': 'one'}, {'text': 'two'}], **layout))
    with pytest.raises(UserError, match=r'a.jsonl:1: .*one (JSON )?object a line is expected'):
        read(tmp_path / 'a.jsonl', tmp_path, 'json', 'text')


def test_a_prompt_is_read_as_training_reads_text(tmp_path):
    contents = '\ufeffone\r\ntwo\nthree\r'.encode()
    (tmp_path / 'a.txt').write_bytes(contents)
    assert [plain.read_text(tmp_path / 'a.txt')] == read(tmp_path / 'a.txt', tmp_path)[0] == ['one\r\ntwo\nthree\r']
    (tmp_path / 'a.txt').write_bytes(contents + b'\xff')
    with pytest.raises(UserError, match=r'a.txt: not UTF-8: .*0xff'):
        plain.read_text(tmp_path / 'a.txt')
    with pytest.raises(UserError, match=r'none.txt: No such file'):
        plain.read_text(tmp_path / 'none.txt')


def test_a_held_out_split_without_text_is_refused(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(9))
    (tmp_path / 'blank.txt').write_text('\n' * 500)
    for unit in ('file', 'line', 'paragraph'):
        config = make_config(source=f'jsonl:{path}', valid_source=f'text:{tmp_path}/blank.txt', text_unit=unit)
        with pytest.raises(
            UserError, match=r'no document in 1|the split "valid" has no text to evaluate, .*blank.txt gives'
        ):
            sources.open_split(config, 'valid')
        sources.open_split(config, 'train')
    write_jsonl(tmp_path / 'b.jsonl', ['text', ' ', 'text', '\n'])
    with pytest.raises(UserError, match=r'"valid" has no text .*b.jsonl gives it 2 documents, all of them blank'):
        sources.open_split(make_config(source=f'jsonl:{tmp_path}/b.jsonl', holdout_every=2), 'valid')


def test_held_out_documents_that_stand_in_training_are_named(tmp_path, capsys):
    texts = make_texts(30)
    train = write_jsonl(tmp_path / 'train.jsonl', [*texts[:20], ' ', texts[3]])
    valid = write_jsonl(tmp_path / 'valid.jsonl', [texts[25], texts[3] + '\n', texts[26], texts[19]])
    config = make_config(source=f'jsonl:{train}', valid_source=f'jsonl:{valid}')
    assert report.overlap(config, 'valid') == report.Overlap(4, [f'{valid}:4', f'{valid}:2'][::-1])
    assert capsys.readouterr().err == ''
    # The same file at both places is said without reading anything.
    config = make_config(source=f'jsonl:{tmp_path}/*.jsonl', valid_source=f'jsonl:{valid}')
    sources.open_split(config, 'train')
    assert f'data.valid_source: 1 of its files are in data.source too ({valid})' in capsys.readouterr().err


def test_prepared_tokens_are_compared_as_well(corpus, tmp_path):
    config = make_config(source=corpus['tokens'])
    assert report.overlap(config, 'valid') == report.Overlap(4, [])
