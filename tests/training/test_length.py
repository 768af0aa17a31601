"""A run made longer where it is, if the steps that it has done stay what they were, and else forked."""

import pytest

from gau.errors import UserError
from gau.training import loop
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config

TINY = {'model__num_layers': 1, 'checkpoint__every_steps': 100, 'eval__every_steps': 4, 'optimizer__warmup_steps': 2}


def test_a_finished_run_is_made_longer_in_its_directory(tmp_path):
    loop.train(tiny_config(steps=4, **TINY), tmp_path / 'run')
    longer = tiny_config(steps=7, **TINY)
    assert loop.train(longer, tmp_path / 'run')['step'] == 7
    loop.train(longer, tmp_path / 'straight')
    assert_trees_equal(read_state(tmp_path / 'run'), read_state(tmp_path / 'straight'))
    assert read_metrics(tmp_path / 'run') == read_metrics(tmp_path / 'straight')
    assert loop.train(longer, tmp_path / 'run')['step'] == 7
    with pytest.raises(UserError, match=r'another length \(steps: 7 -> 4\): it is at step 7 already'):
        loop.train(tiny_config(steps=4, **TINY), tmp_path / 'run')
    with pytest.raises(UserError, match=r'another config \(data.batch_size: 2 -> 4; steps: 7 -> 9\)'):
        loop.train(tiny_config(steps=9, data__batch_size=4, **TINY), tmp_path / 'run')


@pytest.mark.slow
def test_a_run_that_has_decayed_is_forked_from_where_it_had_not(tmp_path):
    decaying = {**TINY, 'optimizer__schedule': 'wsd', 'optimizer__decay_steps': 2, 'checkpoint__keep_last': 1}
    loop.train(tiny_config(steps=6, **decaying), tmp_path / 'run')
    longer = tiny_config(steps=8, **decaying)
    stable = tmp_path / 'run' / 'checkpoints' / '4'
    with pytest.raises(UserError, match=rf'rate from step 5 on, and it is at step 6: .* --fork={stable}$'):
        loop.train(longer, tmp_path / 'run')
    longer.fork = str(stable)
    loop.train(longer, tmp_path / 'branch')
    longer.fork = None
    loop.train(longer, tmp_path / 'straight')
    assert_trees_equal(read_state(tmp_path / 'branch'), read_state(tmp_path / 'straight'))
    rates = [row['learning_rate'] for row in read_metrics(tmp_path / 'straight') if row['split'] == 'train']
    assert rates[4] == rates[5] > rates[7] > 0
