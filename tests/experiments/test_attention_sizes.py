"""gau.experiments.attention_sizes: what is measured is what the layers compute."""

import numpy as np
import pytest

from configs import lm
from gau.errors import UserError
from gau.experiments import attention_sizes
from gau.training import config as training_config
from gau.training.setup import Run
from tests.programs import call


def config_of(*, name='flash', recipe='paper', **fields):
    config = lm.get_config(f'runlocal,model={name},recipe={recipe}')
    config.model.num_layers, config.model.model_dim, config.model.impl = 2, 32, 'xla'
    config.data.attend_across_documents = True
    config.model.normalizer = config.model.relative_bias_init = None
    for field, value in fields.items():
        config.model[field] = value
    return training_config.resolve(config)


def sizes(config, steps=(0,)):
    attention_sizes.check(config)
    return list(attention_sizes.while_training(Run.from_config(config), steps))


def test_a_bias_that_starts_alike_gives_weights_of_scale_squared_over_the_chunk():
    ((step, loss, found),) = sizes(config_of(relative_bias_init='mean', relative_bias_scale=1.0))
    c = 32
    assert (step, list(found['dead'])) == (0, [0, 0])
    assert 5 < loss < 6
    np.testing.assert_allclose(found['bias'], c**-0.5, rtol=1e-6)
    # The query at place t of a chunk sees t + 1 keys.
    np.testing.assert_allclose(found['weight_sum'], (c + 1) / 2 / c, rtol=1e-2)
    assert all(found['score'] < 1e-4)
    assert all(found['global_sum'] < 1e-4)


def test_a_window_of_two_chunks_is_seen_whole():
    ((_, _, found),) = sizes(config_of(recipe='best', relative_bias_scale=1.0))
    c, chunks = 32, 4
    np.testing.assert_allclose(found['bias'], (2 * c) ** -0.5, rtol=1e-6)
    # The query at place t of a chunk sees t + 1 keys, and but for the first chunk those of the one before.
    np.testing.assert_allclose(found['weight_sum'], ((c + 1) / 2 + c * (chunks - 1) / chunks) / (2 * c), rtol=1e-2)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['flash', 'flash_quad'])
def test_the_papers_start_leaves_about_half_of_the_weights_dead(name):
    first, last = sizes(config_of(name=name, relative_bias_init='normal'), steps=(0, 2))
    assert (first[0], last[0]) == (0, 2)
    assert all((first[2]['dead'] > 0.1) & (first[2]['dead'] < 0.9))
    assert all(first[2]['output'] < 1e-2 * first[2]['residual'])
    assert not np.array_equal(first[2]['output'], last[2]['output'])
    assert ('global_sum' in first[2]) == (name == 'flash')
    assert all(first[2].get('global_sum', np.zeros(1)) < 1e-4)


# Of the reference, which is proven elsewhere.
@pytest.mark.slow
def test_softmax_rows_sum_to_one():
    ((_, _, found),) = sizes(config_of(attention_function='softmax', gamma_init='ones'))
    np.testing.assert_allclose(found['weight_sum'], 1, rtol=1e-5)
    assert list(found['dead']) == [0, 0]
    assert all(found['global_sum'] > 0.05)


def test_models_without_gated_units_are_refused():
    for name in ('transformer', 'combiner'):
        with pytest.raises(UserError, match=f'model.name={name} has no gated units'):
            attention_sizes.check(training_config.resolve(lm.get_config(f'runlocal,model={name}')))
    with pytest.raises(UserError, match=r'model\.norm_placement=sandwich'):
        attention_sizes.check(config_of(norm_placement='sandwich'))
    with pytest.raises(UserError, match='no weights'):
        attention_sizes.check(config_of(branches='global'))
    with pytest.raises(UserError, match=r'model\.temperature=learned'):
        attention_sizes.check(config_of(temperature='learned'))


def test_bad_steps_are_one_line_and_code_2():
    code, _, err = call('scripts/attention_sizes.py', '--config=configs/lm.py:runlocal', '--steps=0,x')
    assert (code, err.count('\n')) == (2, 1), err
    assert '--steps=0,x' in err


def test_a_file_that_cannot_be_written_is_said_before_training(tmp_path):
    code, out, err = call('scripts/attention_sizes.py', '--config=configs/lm.py:runlocal', f'--json={tmp_path}')
    assert (code, out, err.count('\n')) == (2, '', 1), err
    assert 'cannot be written: Is a directory' in err
