"""What commands write: whole or not at all, and never over something else."""

import os

import pytest

from gau import outputs
from gau.errors import UserError


def test_a_directory_is_there_when_all_of_it_is(tmp_path):
    path = tmp_path / 'deep' / 'made'
    with outputs.directory(path) as aside:
        (aside / 'part').write_text('1')
        assert not path.exists()
    assert (path / 'part').read_text() == '1'
    with pytest.raises(ZeroDivisionError), outputs.directory(tmp_path / 'other') as aside:
        (aside / 'part').write_text(str(1 / 0))
    assert {entry.name for entry in tmp_path.iterdir()} == {'deep'}


def test_an_empty_directory_is_filled_and_any_other_is_left_alone(tmp_path):
    (tmp_path / 'empty').mkdir()
    with outputs.directory(tmp_path / 'empty') as aside:
        (aside / 'part').write_text('1')
    (tmp_path / 'file').write_text('mine')
    (tmp_path / 'link').symlink_to('nowhere')
    for name in ('empty', 'file', 'link'):
        with pytest.raises(UserError, match=f'--output={tmp_path}/{name} exists already'):
            outputs.check_directory(tmp_path / name)
    with pytest.raises(UserError, match=r'--output=.*/file/made cannot be written: Not a directory'):
        outputs.check_directory(tmp_path / 'file' / 'made')
    assert (tmp_path / 'file').read_text() == 'mine'


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path, monkeypatch):
    outputs.check_file(tmp_path / 'deep' / 'file', flag='plot')
    assert not any((tmp_path / 'deep').iterdir())
    with pytest.raises(UserError, match=r'--plot=.*/deep cannot be written: Is a directory'):
        outputs.check_file(tmp_path / 'deep', flag='plot')
    # (Whoever runs this may be allowed everything.)
    monkeypatch.setattr(os, 'access', lambda path, mode: False)
    with pytest.raises(UserError, match=r'--plot=.*/deep/file cannot be written: Permission denied'):
        outputs.check_file(tmp_path / 'deep' / 'file', flag='plot')
