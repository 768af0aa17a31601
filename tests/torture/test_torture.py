"""The campaign of faults: a few of its inputs, what it takes for a fault of ours, and, slowly, a whole round."""

import subprocess
import sys

import numpy as np
import pytest

from gau.data import tokenizers
from gau.torture import campaign, damage, lab, tally
from tests.conftest import ROOT


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    bench = lab.Lab(tmp_path_factory.mktemp('torture') / 'lab', seed=0)
    assert bench.tokens.is_dir()
    return bench


def test_data_cut_anywhere_is_refused_or_does_not_matter(bench):
    files, counted = damage._Files(bench.directory, seed=5), tally.Tally('data')
    for kind in (files.prepared, files.packed, files.tokenizer):
        for _ in range(12):
            files.one(counted, kind)
    assert counted.notes == []
    assert (counted.faults, counted.runs, counted.clean) == (36, 36, True)
    assert counted.refused > 18


def test_what_is_silently_taken_and_what_is_thrown_are_found(bench, monkeypatch):
    files, counted = damage._Files(bench.directory, seed=6), tally.Tally('data')
    # As if any file, even a damaged one, were a tokenizer.
    monkeypatch.setattr(tokenizers, '_read', lambda path, spec: b'' if 'damaged' in path else b'x')
    monkeypatch.setattr(tokenizers, '_KINDS', {'huggingface': lambda path: Counting(tokenizers._read(path, ''))})
    files.one(counted, files.tokenizer)
    assert (counted.differ, counted.tracebacks) == (1, 0)
    monkeypatch.setattr(tokenizers, '_KINDS', {'huggingface': lambda path: 1 / 0})
    files.one(counted, files.tokenizer)
    assert (counted.differ, counted.tracebacks, counted.clean) == (1, 1, False)
    assert 'ZeroDivisionError' in counted.notes[1]


class Counting:
    """A tokenizer that gives one token for each byte of its file."""

    def __init__(self, contents):
        self.contents = contents

    def encode(self, text):
        return np.zeros(len(self.contents))


def test_the_table_adds_up():
    good, bad = tally.Tally('training', faults=3, runs=5), tally.Tally('preparing', faults=1, runs=2)
    bad.loses(0, 'nothing')
    bad.loses(2, 'two steps')
    bad.prints('a program', 'all is well')
    bad.prints('a program', 'Traceback (most recent call last):\n  ...\nKeyError: 1')
    assert (good.clean, bad.clean, len(bad.notes)) == (True, False, 2)
    assert tally.from_json(tally.to_json(bad)) == bad
    lines = tally.table([good, bad, tally.Tally('clock')]).splitlines()
    assert lines[-1] == '| all | 4 | 7 | 0 | 0 | 2 | 1 |'
    assert len(lines) == 5


@pytest.mark.slow
def test_a_round(tmp_path):
    scenes = 'preparing,training,two programs,full disk,damaged files'
    done = subprocess.run(
        [sys.executable, 'scripts/torture.py', f'--scenes={scenes}', '--rounds=1', '--minutes=60', '--seed=1'],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    assert done.stdout.splitlines()[-1].startswith('| all |')


def test_a_scene_that_there_is_not():
    assert campaign.DAMAGED in campaign.NAMES
    done = subprocess.run(
        [sys.executable, 'scripts/torture.py', '--scenes=trainig'], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (2, 'error: --scenes: unknown "trainig"; did you mean "training"?\n')
