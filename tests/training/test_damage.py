"""What a work directory may lack or have damaged, a disk that is full, and training where signals are not caught."""

import asyncio
import gc
import itertools
import json
import resource
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from gau.errors import NoSpace, RunFailed, UserError
from gau.training import checkpoints, evaluate, loop, workdir
from gau.training.load import load_run
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config

CONFIG = {'model__num_layers': 1}


@pytest.fixture(scope='module')
def finished(tiny_run):
    return tiny_run


# A checkpoint without `meta` and torn metrics, which are most of it, are the fast test.
@pytest.mark.slow
def test_what_can_be_made_again_is(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / 'run')
    final = workdir.read_json(path / 'final.json')
    for damaged in ('', '[]'):
        (path / 'final.json').write_text(damaged)
        (path / 'data.json').write_text(damaged)
        loop.train(tiny_config(**CONFIG), path)
        found = workdir.read_json(path / 'final.json')
        assert (found['eval'], found['step']) == (final['eval'], 6)
        contents = [workdir.read_json(run / 'data.json')['contents'] for run in (path, finished)]
        assert contents[0] == contents[1]
    assert read_metrics(path) == read_metrics(finished)


def test_a_run_goes_on_from_a_checkpoint_copied_without_meta_and_with_torn_metrics(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / 'run')
    (path / 'final.json').unlink()
    for meta in path.glob('checkpoints/*/meta'):
        shutil.rmtree(meta)
    for step in ('4', '6'):
        (path / 'checkpoints' / step).rename(tmp_path / step)
    # Cut just before the end of a line, and lines that are none of ours.
    lines = (path / 'metrics.jsonl').read_bytes().splitlines(keepends=True)
    (path / 'metrics.jsonl').write_bytes(b'[]\n{"step": "x"}\n\xff\n' + b''.join(lines[:2]).rstrip())
    assert load_run(path)[2] == 2
    loop.train(tiny_config(**CONFIG), path)
    assert_trees_equal(read_state(path), read_state(finished))
    assert read_metrics(path) == read_metrics(finished)


def test_a_damaged_config_is_one_line_that_says_where_a_copy_is(finished, tmp_path):
    path = shutil.copytree(finished, tmp_path / 'run')
    for damaged in ('', '{"seed": ', '[]', '{"seed": 0, "model": 3}'):
        (path / 'config.json').write_text(damaged)
        with pytest.raises(UserError, match=r'config.json is not .*; .*points/6/meta/metadata has it under "config"$'):
            loop.train(tiny_config(**CONFIG), path)
    copy = json.loads((path / 'checkpoints' / '6' / 'meta' / 'metadata').read_text())['config']
    workdir.write_json(path / 'config.json', copy)
    assert loop.train(tiny_config(**CONFIG), path)['step'] == 6


def test_a_full_disk_is_one_line_and_costs_nothing_that_was_saved(finished, tmp_path, capfd):
    path, limits = tmp_path / 'run', resource.getrlimit(resource.RLIMIT_FSIZE)
    original = loop._Loop.settle

    def full_from_step_three(self):
        original(self)
        if self.step == 3:
            self.saved.wait()
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, 'settle', full_from_step_three)
        try:
            with pytest.raises(NoSpace, match='the checkpoint of step 2 is safe; when there is room the same command'):
                loop.train(tiny_config(**CONFIG), path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'Traceback' not in capfd.readouterr().err
    loop.train(tiny_config(**CONFIG), path)
    assert_trees_equal(read_state(path), read_state(finished))
    assert read_metrics(path) == read_metrics(finished)


@pytest.mark.slow
def test_a_clock_that_jumps_costs_nothing_that_was_saved(finished, tmp_path, monkeypatch):
    looks, true_time = itertools.count(), time.time
    # So often that Orbax takes a save for one that hangs.
    monkeypatch.setattr(time, 'time', lambda: true_time() + 400 * 86_400 * (next(looks) // 3 % 2))
    with pytest.raises(RunFailed, match=r'a save was not done in time .*; the same command goes on'):
        loop.train(tiny_config(**CONFIG), tmp_path / 'run')
    monkeypatch.undo()
    loop.train(tiny_config(**CONFIG), tmp_path / 'run')
    assert_trees_equal(read_state(tmp_path / 'run'), read_state(finished))


def test_what_cannot_be_written_is_printed_all_the_same(finished, tmp_path, capsys):
    path = shutil.copytree(finished, tmp_path / 'run')
    # Stands for a file system that is mounted to be read, which nobody but root can make.
    (path / 'eval.jsonl').mkdir()
    evaluate.evaluate(path, max_tokens=100)
    out, err = capsys.readouterr()
    assert 'bits per byte' in out
    assert 'eval.jsonl cannot be written (Is a directory): nothing is kept but what is printed above\n' in err
    assert 'written: ' not in out
    (path / 'eval.jsonl').rmdir()
    (path / 'eval.jsonl').write_text('{"step": 6, "spl')
    shutil.rmtree(path / 'plots')
    (path / 'plots').write_text('in the way')
    evaluate.evaluate(path, max_tokens=100)
    out, err = capsys.readouterr()
    assert 'the rest is what is printed above' in err
    assert f'written: {path}/eval.jsonl\n' in out
    torn, row = (path / 'eval.jsonl').read_text().splitlines()
    assert (torn, json.loads(row)['step']) == ('{"step": 6, "spl', 6)


def test_reads_that_nobody_waits_for_print_nothing(monkeypatch):
    async def read():
        try:
            await asyncio.sleep(60)
        except BaseException as error:
            raise Exception('error while reading') from error

    async def fail():
        asyncio.current_task().reads = [asyncio.ensure_future(read()) for _ in range(3)]
        await asyncio.sleep(0)
        raise OSError('damaged')

    def restore():
        # As Orbax does: the loop is closed over the reads that are left.
        loop = asyncio.new_event_loop()
        with pytest.raises(OSError, match='damaged'):
            loop.run_until_complete(fail())
        loop.close()

    printed = []
    monkeypatch.setattr(sys, 'unraisablehook', printed.append)
    restore()
    checkpoints._end_unfinished_reads()
    gc.collect()
    assert printed == []


def test_from_a_thread_and_under_a_running_event_loop(finished, tmp_path):
    """As in a notebook, and as in a program that trains beside something else."""

    async def train_and_read():
        loop.train(tiny_config(**CONFIG), tmp_path / 'run')
        return load_run(tmp_path / 'run')

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(asyncio.run, train_and_read()).result()[2] == 6
    asyncio.run(train_and_read())
    assert_trees_equal(read_state(tmp_path / 'run'), read_state(finished))
