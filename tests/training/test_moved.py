"""A project that moves, with its runs and its data, goes on where it was."""

import shutil

import pytest

from gau.errors import UserError
from gau.training import workdir
from gau.training.config import resolve
from gau.training.load import load_run
from gau.training.loop import train
from tests.data.conftest import make_texts, write_jsonl
from tests.training.tiny import read_metrics, tiny_config


def config(**overrides):
    overrides = {'data__source': 'jsonl:texts/*.jsonl', 'data__valid_source': 'jsonl:valid.jsonl', **overrides}
    return tiny_config(model__num_layers=1, eval__every_steps=6, **overrides)


@pytest.fixture
def project(tmp_path, monkeypatch):
    folder = tmp_path / 'here'
    (folder / 'texts').mkdir(parents=True)
    write_jsonl(folder / 'texts' / 'a.jsonl', make_texts(60))
    write_jsonl(folder / 'valid.jsonl', make_texts(3, seed=1))
    monkeypatch.chdir(folder)
    return folder


def forget_the_end(workdir):
    """As if killed before the last checkpoint."""
    shutil.rmtree(workdir / 'checkpoints' / '6')
    (workdir / 'final.json').unlink()


def test_a_moved_project_goes_on(project, tmp_path, monkeypatch, capsys):
    train(config(), 'runs/a')
    whole = read_metrics(project / 'runs' / 'a')
    forget_the_end(project / 'runs' / 'a')
    moved = tmp_path / 'there'
    shutil.move(project, moved)
    monkeypatch.chdir(tmp_path)
    # From whatever directory it is read, the run finds its data.
    config_read = load_run(moved / 'runs' / 'a')[0].config.data
    assert (config_read.source, config_read.valid_source) == (
        f'jsonl:{moved}/texts/*.jsonl',
        f'jsonl:{moved}/valid.jsonl',
    )
    monkeypatch.chdir(moved)
    train(config(), 'runs/a')
    assert 'resumed at step 4' in capsys.readouterr().err
    assert read_metrics(moved / 'runs' / 'a') == whole
    # Its config says where the data is now, so that evaluation finds it.
    assert str(moved) in (moved / 'runs' / 'a' / 'config.json').read_text()
    assert str(project) not in (moved / 'runs' / 'a' / 'config.json').read_text()
    # A fork goes on in the same data, too.
    forget_the_end(moved / 'runs' / 'a')
    again = tmp_path / 'again'
    shutil.copytree(moved, again)
    monkeypatch.chdir(again)
    train(config(fork='runs/a'), 'runs/b')
    assert 'data from their start' not in capsys.readouterr().err
    assert read_metrics(again / 'runs' / 'b')[-1] == whole[-1]


@pytest.mark.slow
def test_a_run_of_an_earlier_version_goes_on_too(project, tmp_path, monkeypatch, capsys):
    train(config(), 'runs/a')
    forget_the_end(project / 'runs' / 'a')
    (project / 'runs' / 'a' / 'data.json').unlink()
    moved = tmp_path / 'there'
    shutil.move(project, moved)
    monkeypatch.chdir(moved)
    shutil.copytree(moved, tmp_path / 'other')
    train(config(), 'runs/a')
    assert 'resumed at step 4' in capsys.readouterr().err
    # It knew times as well, so other files are other data.
    monkeypatch.chdir(tmp_path / 'other')
    write_jsonl(tmp_path / 'other' / 'texts' / 'a.jsonl', make_texts(60))
    with pytest.raises(UserError, match='with other data'):
        train(config(), 'runs/a')


def test_other_data_at_the_new_place_is_refused(project, tmp_path, monkeypatch):
    train(config(steps=2, optimizer__warmup_steps=1, checkpoint__every_steps=1), 'runs/a')
    moved = tmp_path / 'there'
    shutil.copytree(project, moved)
    monkeypatch.chdir(moved)
    longer = resolve(config(steps=3, optimizer__warmup_steps=1, checkpoint__every_steps=1))
    asked = []
    refusal = lambda stored: asked.append(stored.data.source) or ''  # noqa: E731
    with workdir.claim(moved / 'runs' / 'a', longer, of_other_length=refusal) as resuming:
        assert resuming
    assert set(asked) == {f'jsonl:{moved}/texts/*.jsonl'}
    write_jsonl(moved / 'texts' / 'a.jsonl', make_texts(60, seed=5))
    before = (moved / 'runs' / 'a' / 'config.json').read_text()
    with pytest.raises(UserError, match=r'holds a run with other data \(data.source: .*here.*there'):
        train(config(steps=2, optimizer__warmup_steps=1, checkpoint__every_steps=1), 'runs/a')
    with pytest.raises(UserError, match=r'another config \(.*optimizer.learning_rate'):
        train(
            config(steps=2, optimizer__warmup_steps=1, checkpoint__every_steps=1, optimizer__learning_rate=1.0),
            'runs/a',
        )
    assert (moved / 'runs' / 'a' / 'config.json').read_text() == before
