"""The loop in one process: the files of the contract, resuming, forking, and the ways in which a run ends badly."""

import functools
import json
import shutil
import signal

import numpy as np
import pytest

from gau.data.passes import Passes
from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.attentions.record import Needs
from gau.training import loop, workdir
from gau.training.load import load_run
from gau.training.setup import Run
from tests.training import tiny
from tests.training.tiny import assert_trees_equal, read_metrics, read_state

tiny_config = functools.partial(tiny.tiny_config, model__num_layers=1)


@pytest.fixture(scope='module')
def finished(tiny_run):
    """A run of 6 steps that nothing disturbed."""
    return tiny_run


def copy_until(finished, path, step):
    """Copies a finished run as it was when the checkpoint of `step` was its newest, with later metrics lines left."""
    shutil.copytree(finished, path)
    for entry in (path / 'checkpoints').iterdir():
        if entry.name.isdecimal() and int(entry.name) > step:
            shutil.rmtree(entry)
    (path / 'final.json').unlink()
    return path


def test_writes_the_files_of_the_contract(finished):
    rows = workdir.read_metrics(finished / 'metrics.jsonl')
    train = [row for row in rows if row['split'] == 'train']
    assert [row['step'] for row in train] == [1, 2, 3, 4, 5, 6]
    keys = {'loss', 'tokens', 'tokens_per_second', 'step_seconds', 'mfu', 'learning_rate', 'grad_norm'}
    assert keys <= train[-1].keys()
    assert train[-1]['tokens'] == 2 * 48
    assert train[-1]['tokens_per_second'] > 0
    assert train[-1]['mfu'] is None
    evaluations = [row for row in rows if row['split'] == 'eval/valid']
    assert [row['step'] for row in evaluations] == [4, 6]
    assert {'loss', 'perplexity', 'bits_per_byte', 'tokens'} <= evaluations[0].keys()
    assert sorted(int(entry.name) for entry in (finished / 'checkpoints').iterdir()) == [2, 4, 6]
    final = json.loads((finished / 'final.json').read_text())
    assert final['step'] == 6
    assert final['eval']['valid']['loss'] == evaluations[-1]['loss']
    assert json.loads((finished / 'config.json').read_text())['model']['name'] == 'flash'
    assert 'embedding' in (finished / 'parameters.txt').read_text()
    # One device holds everything.
    assert not (finished / 'shardings.txt').exists()
    assert {path.name for path in (finished / 'plots').iterdir()} == {'loss.png', 'loss_by_position.png'}
    assert all(path.read_bytes().startswith(b'\x89PNG') for path in (finished / 'plots').iterdir())


def test_event_files_are_read_by_tensorboard(finished):
    accumulators = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator', reason='tensorboard is not installed'
    )
    events = accumulators.EventAccumulator(str(finished / 'tensorboard')).Reload()
    assert [event.step for event in events.Scalars('train/loss')] == [1, 2, 3, 4, 5, 6]


def test_a_finished_run_stays_as_it_is(finished, capsys):
    before = (finished / 'metrics.jsonl').read_bytes()
    final = loop.train(tiny_config(), finished)
    assert final == json.loads((finished / 'final.json').read_text())
    assert 'finished at step 6' in capsys.readouterr().out
    assert (finished / 'metrics.jsonl').read_bytes() == before


def with_lower_loss_at(path, step, loss):
    """Changes what a run's metrics.jsonl says of one evaluation."""
    rows = workdir.read_metrics(path / 'metrics.jsonl')
    own = [row | {'loss': loss} if (row['step'], row['split']) == (step, 'eval/valid') else row for row in rows]
    (path / 'metrics.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in own))


def test_a_run_says_how_often_it_reads_its_text_and_that_its_loss_has_risen(finished, tmp_path, capsys, monkeypatch):
    path = copy_until(finished, tmp_path / 'run', 6)
    with_lower_loss_at(path, 4, 1.0)
    monkeypatch.setattr(Run, 'passes', lambda run, steps: {'tokens:a': Passes(1.1 * steps, 99)})
    final = loop.train(tiny_config(), path)
    said, last = capsys.readouterr().err.splitlines(), final['eval']['valid']['loss']
    assert '576 tokens, 6.6 times over the 99 training tokens of tokens:a' in said
    assert said[-2].endswith(', lowest 1.0000 at step 4')
    assert said[-1] == (
        f'held-out loss (valid) was lowest at step 4 (1.000) and is {last:.3f} now: after 6.6 passes over the same '
        'text, more of them no longer help; the checkpoint of step 4 is kept, for --step=4 of eval.py and sample.py'
    )
    assert final['passes']['tokens:a']['tokens'] == 99
    loop.train(tiny_config(), path)
    assert f'lowest at step 4 (1.000) and is {last:.3f} now\n' in capsys.readouterr().out


@pytest.mark.parametrize('step', [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(6, marks=pytest.mark.slow)])
def test_resumed_equals_uninterrupted_bitwise(finished, tmp_path, step):
    path = copy_until(finished, tmp_path / 'run', step)
    loop.train(tiny_config(), path)
    assert_trees_equal(read_state(path), read_state(finished))
    assert read_metrics(path) == read_metrics(finished)


@pytest.mark.slow
def test_a_run_from_before_there_were_streams_goes_on_and_is_read(finished, tmp_path):
    path = copy_until(finished, tmp_path / 'run', 4)
    tree = workdir.read_json(path / 'config.json')
    del tree['data']['streams']
    workdir.write_json(path / 'config.json', tree)
    for data in path.glob('checkpoints/*/data'):
        # As Grain wrote the state of the only iterator then.
        alone = workdir.read_json(data / 'metadata')['0']
        (data / 'metadata').unlink()
        workdir.write_json(data / 'process_0-of-1.json', alone)
    assert load_run(path)[2] == 4
    loop.train(tiny_config(), path)
    assert_trees_equal(read_state(path), read_state(finished))
    assert read_metrics(path) == read_metrics(finished)


def test_entries_of_one_type_measure_each_in_its_own_time(tmp_path):
    config = tiny_config(eval__every_steps=3)
    # A step has 2 x 48 tokens.
    config.evaluators.often = {'type': 'perplexity', 'every_tokens': 2 * 96}
    config.evaluators.seldom = {'type': 'perplexity', 'every_percent': 100, 'max_tokens': 200}
    loop.train(config, tmp_path)
    steps, tokens = {}, {}
    for row in read_metrics(tmp_path):
        steps.setdefault(row['split'], []).append(row['step'])
        tokens[row['split']] = row['tokens']
    del steps['train']
    assert steps == {'eval/valid': [3, 6], 'often/valid': [2, 4, 6], 'seldom/valid': [6]}
    # Whole rows of 48 tokens.
    assert tokens['seldom/valid'] == 5 * 48 < tokens['often/valid'] == tokens['eval/valid']


def test_a_run_goes_on_with_another_implementation_and_says_which(finished, tmp_path, capsys):
    assert json.loads((finished / 'config.json').read_text())['model']['impl'] == 'auto'
    path = copy_until(finished, tmp_path / 'run', 4)
    loop.train(tiny_config(model__impl='reference'), path)
    said = ''.join(capsys.readouterr())
    assert 'attention: reference, resumed at step 4' in said
    losses, others = ([row['loss'] for row in read_metrics(run) if row['step'] == 6] for run in (path, finished))
    np.testing.assert_allclose(losses, others, rtol=1e-3)


def test_an_implementation_for_another_chip_is_refused_in_training_and_replaced_in_reading(
    finished, tmp_path, monkeypatch, caplog
):
    path = shutil.copytree(finished, tmp_path / 'run')
    tree = workdir.read_json(path / 'config.json')
    workdir.write_json(path / 'config.json', tree | {'model': tree['model'] | {'impl': 'xla'}})
    record = type(ARCHITECTURES['flash'].attention)
    needs = Needs(lambda config, target: f'a GPU, this is {target.platform}')
    monkeypatch.setattr(record, 'implementations', {**record.implementations, 'xla': needs})
    with pytest.raises(UserError, match=r'model.impl=xla needs a GPU, this is cpu'):
        loop.train(tiny_config(model__impl='xla'), path)
    caplog.clear()
    run, _, step = load_run(path)
    assert (run.model.implementation.attention, step) == ('reference', 6)
    # In a notebook, what Orbax warns of would be the first that a reader sees.
    assert not [record.message for record in caplog.records if record.name == 'absl']


def test_signal_saves_and_resumes(finished, tmp_path):
    config = tiny_config()
    original = loop._Loop.settle

    def interrupt_after_three(self):
        original(self)
        if self.step == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, 'settle', interrupt_after_three)
        with pytest.raises(loop.Interrupted) as caught:
            loop.train(config, tmp_path)
    assert caught.value.exit_code == 143
    assert (tmp_path / 'checkpoints' / '3').is_dir()
    loop.train(config, tmp_path)
    assert_trees_equal(read_state(tmp_path), read_state(finished))
    assert read_metrics(tmp_path) == read_metrics(finished)


def test_damaged_checkpoint_falls_back_and_is_kept(finished, tmp_path, capsys):
    path = copy_until(finished, tmp_path / 'run', 4)
    largest = max((path / 'checkpoints' / '4').rglob('*'), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    loop.train(tiny_config(), path)
    assert 'checkpoints/4 is damaged' in capsys.readouterr().err
    assert (path / 'damaged_checkpoints' / '4').is_dir()
    assert_trees_equal(read_state(path), read_state(finished))
    assert read_metrics(path) == read_metrics(finished)


def test_all_checkpoints_damaged_is_an_error_that_touches_nothing(finished, tmp_path):
    path = copy_until(finished, tmp_path / 'run', 2)
    for file in (path / 'checkpoints' / '2').rglob('*'):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    before = (path / 'metrics.jsonl').read_bytes()
    with pytest.raises(UserError, match='can be read'):
        loop.train(tiny_config(), path)
    assert (path / 'checkpoints' / '2').is_dir()
    assert (path / 'metrics.jsonl').read_bytes() == before


def test_changed_config_is_refused_and_forked(finished, tmp_path):
    changed = tiny_config(optimizer__learning_rate=1e-4)
    with pytest.raises(UserError, match=r'optimizer.learning_rate: 0.0007 -> 0.0001'):
        loop.train(changed, finished)
    changed.fork = str(finished)
    changed.steps = 8
    loop.train(changed, tmp_path / 'fork')
    rows = read_metrics(tmp_path / 'fork')
    assert [row['step'] for row in rows if row['split'] == 'train'] == [7, 8]
    # Parameters and data go on where the parent stood: step 7 sees what it sees in a run that never forked.
    loop.train(tiny_config(steps=7), tmp_path / 'straight')
    straight = [row for row in read_metrics(tmp_path / 'straight') if row['split'] == 'train']
    assert rows[0]['loss'] == straight[-1]['loss']
    assert rows[0]['learning_rate'] != straight[-1]['learning_rate']


def test_fork_of_another_architecture_is_refused(finished, tmp_path):
    config = tiny_config(model__model_dim=16, fork=str(finished))
    with pytest.raises(UserError, match='another architecture'):
        loop.train(config, tmp_path / 'fork')


def test_divergence_names_step_culprits_and_checkpoint(tmp_path):
    config = tiny_config(optimizer__learning_rate=1e30, optimizer__clip='none', optimizer__warmup_steps=0)
    config.checkpoint.every_steps = 5
    with pytest.raises(loop.NotFinite, match=r'at step 2.*blocks_0.*last good checkpoint: none; try .* another'):
        loop.train(config, tmp_path / 'run')
    assert not list((tmp_path / 'run' / 'checkpoints').iterdir())
    assert workdir.read_diverged(tmp_path / 'run') == 2
    # No advice that cannot be followed.
    config.optimizer.learning_rate = 1e-3
    with pytest.raises(UserError, match=r'another work directory \(it has no checkpoint to --fork from\)'):
        loop.train(config, tmp_path / 'run')


@pytest.fixture(scope='module')
def two_splits(tmp_path_factory):
    """A run that evaluates two splits at step 4, which is not a step to save at, and at the end."""
    config = tiny_config(eval__splits=('valid', 'train'), checkpoint__every_steps=5)
    path = tmp_path_factory.mktemp('runs') / 'two_splits'
    loop.train(config, path)
    return config, path


# A signal between steps is the fast one.
@pytest.mark.slow
@pytest.mark.parametrize('step', [4, 6])
def test_signal_during_evaluation_saves_and_goes_on_there(two_splits, tmp_path, step):
    config, straight = two_splits
    original = loop._Loop._report

    def interrupt_after_the_first_split(self, *args):
        original(self, *args)
        if self.step == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, '_report', interrupt_after_the_first_split)
        with pytest.raises(loop.Interrupted, match=f'saved at step {step}'):
            loop.train(config, tmp_path)
    assert (tmp_path / 'checkpoints' / str(step)).is_dir()
    loop.train(config, tmp_path)
    assert read_metrics(tmp_path) == read_metrics(straight)


def test_a_fork_that_fails_leaves_nothing_and_can_be_corrected(finished, tmp_path):
    config = tiny_config(fork=str(tmp_path / 'nothing'), steps=8)
    with pytest.raises(UserError, match='holds no run'):
        loop.train(config, tmp_path / 'fork')
    with pytest.raises(UserError, match='ends at 6'):
        loop.train(tiny_config(fork=str(finished)), tmp_path / 'fork')
    assert not (tmp_path / 'fork').exists()


def test_a_fork_of_what_cannot_be_read_can_be_corrected(finished, tmp_path, capsys):
    parent = copy_until(finished, tmp_path / 'parent', 2)
    shutil.rmtree(parent / 'checkpoints' / '2' / 'state')
    with pytest.raises(UserError, match=r'\[2\] are damaged'):
        loop.train(tiny_config(fork=str(parent / 'checkpoints' / '2')), tmp_path / 'fork')
    assert {path.name for path in (tmp_path / 'fork').iterdir()} == {'.lock'}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, 'run_to', lambda self, total_steps: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(tiny_config(fork=str(finished / 'checkpoints' / '4')), tmp_path / 'fork')
    assert (tmp_path / 'fork' / 'checkpoints' / '4').is_dir()
    # Begun, it goes on from where it is, whatever the command says now.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, 'run_to', lambda self, total_steps: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(tiny_config(fork=str(parent)), tmp_path / 'fork')
    assert 'warning: fork=' in capsys.readouterr().err
    assert (tmp_path / 'fork' / 'checkpoints' / '4').is_dir()


@pytest.mark.slow
def test_a_fork_stays_at_the_checkpoint_it_began_from(finished, tmp_path):
    parent = copy_until(finished, tmp_path / 'parent', 2)
    config = tiny_config(fork=str(parent), optimizer__learning_rate=1e-4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Loop, 'run_to', lambda self, total_steps: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(config, tmp_path / 'fork')
    # The parent goes on; the child, killed before its first own step, must not jump ahead. Nor need --fork be repeated.
    loop.train(tiny_config(), parent)
    loop.train(tiny_config(optimizer__learning_rate=1e-4), tmp_path / 'fork')
    steps = [row['step'] for row in read_metrics(tmp_path / 'fork') if row['split'] == 'train']
    assert steps == [3, 4, 5, 6]


def test_impossible_evaluations_are_refused_before_training(tmp_path):
    for fields, message in (
        ({'eval__splits': ('vald',)}, 'did you mean "valid"'),
        ({'eval__contexts': (-4,)}, 'eval.contexts'),
        ({'eval__contexts': ('a',)}, "'a' is no number of tokens"),
        ({'data__batch_size': 10**15}, 'tokens a step'),
        ({'data__context': 10**15}, 'tokens a step'),
        ({'seed': -1}, 'seed=-1'),
        ({'seed': 2**70}, r'must lie in 0\.\.2147483647'),
        ({'steps': 0}, 'steps=0'),
        ({'optimizer__b1': 1.5}, 'b1'),
        ({'optimizer__learning_rate': float('nan')}, 'learning_rate'),
        ({'eval__max_tokens': -7}, 'max_tokens'),
        ({'model__dtype': 'float64'}, 'JAX_ENABLE_X64'),
    ):
        with pytest.raises(UserError, match=message):
            loop.train(tiny_config(**fields), tmp_path / 'run')
    assert not (tmp_path / 'run').exists()


def test_metrics_survive_lost_checkpoints(finished, tmp_path):
    path = tmp_path / 'run'
    shutil.copytree(finished, path)
    shutil.rmtree(path / 'checkpoints')
    before = (path / 'metrics.jsonl').read_text()
    loop.train(tiny_config(), path)
    assert (path / 'metrics.dropped.jsonl').read_text() == before
    assert read_metrics(path) == read_metrics(finished)


def test_resuming_on_changed_data_is_said_aloud(tmp_path, capsys):
    texts = tmp_path / 'texts'
    texts.mkdir()
    for number in range(4):
        (texts / f'{number}.txt').write_text(f'text number {number}. ' * 100)
    config = tiny_config(data__source=f'text:{texts}/*.txt', steps=2, optimizer__warmup_steps=1)
    loop.train(config, tmp_path / 'run')
    (tmp_path / 'run' / 'final.json').unlink()
    loop.train(config, tmp_path / 'run')
    assert 'has changed' not in capsys.readouterr().err
    (texts / '9.txt').write_text('one more')
    (tmp_path / 'run' / 'final.json').unlink()
    loop.train(config, tmp_path / 'run')
    assert 'texts/*.txt has changed since the checkpoint' in capsys.readouterr().err
