"""Data is what it is, wherever it lies."""

import os
import shutil

import pytest

from gau.data import places, prepare, sources, tokenizers
from gau.data.documents import Texts
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts, write_jsonl

SOURCES = ('text', 'jsonl', 'tokens', 'mixture', 'valid')


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A directory with data of every kind and a tokenizer, in which one stands."""
    folder = tmp_path / 'home' / 'project [1]'
    (folder / 'books' / 'deep').mkdir(parents=True)
    for i, text in enumerate(make_texts(9)):
        (folder / 'books' / ('deep' if i % 2 else '') / f'{i}.txt').write_text(text)
    write_jsonl(folder / 'a.jsonl', make_texts(20))
    monkeypatch.chdir(folder)
    path = prepare._train_tokenizer(folder / 'own.model', Texts(make_texts(60)), 300, 10**5)
    config = make_config(source='jsonl:a.jsonl', tokenizer=path)
    prepare.prepare(config, folder / 'tokens', workers=1)
    return folder


def config_of(kind):
    return make_config(**{
        'text': {'source': 'text:books/**/*.txt'},
        'jsonl': {'source': 'jsonl:a.jsonl', 'tokenizer': 'sentencepiece:own.model'},
        'tokens': {'source': 'tokens:tokens'},
        'mixture': {'source': 'mixture', 'mixture': ((1, 'tokens:tokens'), (2, 'jsonl:./a.jsonl,a.jsonl'))},
        'valid': {'source': 'text:books/*.txt', 'valid_source': 'text:books/deep/*.txt'},
    }[kind])  # fmt: skip


@pytest.mark.parametrize('kind', SOURCES)
@pytest.mark.parametrize('how', ['moved', 'copied', 'a directory above moved'])
def test_the_same_data_elsewhere_is_the_same_and_is_found(project, tmp_path, monkeypatch, kind, how):
    recorded, before = places.record(config_of(kind), 'runs/mine'), config_of(kind)
    assert places.found_again(recorded, before, 'runs/mine') == before
    if how == 'a directory above moved':
        new = tmp_path / 'elsewhere' / project.name
        shutil.move(project.parent, new.parent)
    else:
        new = tmp_path / 'elsewhere'
        (shutil.move if how == 'moved' else shutil.copytree)(project, new)
        if how == 'copied':
            # Times change, and the first place has other data now.
            (project / 'a.jsonl').write_text('{"text": "other"}\n')
            (project / 'books' / 'deep' / '1.txt').write_text('other')
            shutil.rmtree(project / 'tokens')
    monkeypatch.chdir(new)
    after = config_of(kind)
    assert after.source != before.source or kind == 'mixture'
    assert places.are_same(recorded, after)
    assert places.found_again(recorded, before, 'runs/mine') == after
    # From another directory, the work directory tells.
    monkeypatch.chdir(tmp_path)
    assert places.found_again(recorded, before, new / 'runs' / 'mine') == after


@pytest.mark.parametrize('kind', SOURCES)
def test_other_data_is_not_the_same(project, kind):
    recorded = places.record(config_of(kind), 'runs/mine')
    if kind in ('text', 'valid'):
        (project / 'books' / 'deep' / '1.txt').write_text((project / 'books' / 'deep' / '1.txt').read_text()[:-1] + '!')
    elif kind == 'jsonl':
        shutil.copy(project / 'tokens' / 'tokenizer.model', project / 'own.model')
        with open('own.model', 'ab') as file:
            file.write(b'\x1a\x00')
    else:
        shutil.rmtree(project / 'tokens')
        write_jsonl(project / 'a.jsonl', make_texts(20, seed=1))
        sources._text_files.cache_clear()
        prepare.prepare(config_of('jsonl'), project / 'tokens', workers=1)
    tokenizers.load.cache_clear()
    assert not places.are_same(recorded, config_of(kind))


def test_order_and_roles_count(project):
    one = places.contents(make_config(source='text:books/0.txt,books/2.txt', valid_source='text:books/4.txt'))
    for source, valid in (
        ('books/2.txt,books/0.txt', 'books/4.txt'),
        ('books/4.txt,books/2.txt', 'books/0.txt'),
        ('books/0.txt', 'books/2.txt,books/4.txt'),
    ):
        assert places.contents(make_config(source=f'text:{source}', valid_source=f'text:{valid}')) != one
    mixtures = [((1, 'text:books/0.txt'), (weight, 'text:books/2.txt')) for weight in (1, 2)]
    assert len({tuple(places.contents(make_config(source='mixture', mixture=mixture))) for mixture in mixtures}) == 2


def test_what_is_gone_stays_where_it_was(project, tmp_path, monkeypatch):
    config = config_of('jsonl')
    recorded = places.record(config, 'runs/mine')
    monkeypatch.chdir(tmp_path)
    os.remove(project / 'a.jsonl')
    assert places.found_again(recorded, config, tmp_path / 'runs' / 'mine') == config
    with pytest.raises(UserError, match='no file matches'):
        places.are_same(recorded, config)
