"""model.relative_bias_init: where the relative bias starts, and so relu^2's weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.models.config import default_config, resolve
from gau.models.registry import build
from gau.models.target import Target


def relative_biases(context=64, drawn_for=None, **fields):
    """Returns the resolved config and the parameters of every layer's bias, freshly drawn by a call of some length."""
    config = default_config()
    config.update({'size': 'tiny', 'num_layers': 2, 'model_dim': 32, 'dtype': 'float32', **fields})
    config = resolve(config, causal=True, context=context)
    model = build(config, vocab_size=64, causal=True, target=Target.of_device(jax.devices()[0], sequence_shards=1))
    tokens_BN = jnp.zeros((1, drawn_for or context), jnp.int32)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens_BN))['params']
    layers = [block.get('gau') or block['attention'] for name, block in params.items() if name.startswith('blocks_')]
    assert len(layers) == 2
    return config, [layer['relative_bias'] for layer in layers]


@pytest.mark.parametrize(
    ('fields', 'positions'),
    [
        ({'name': 'flash', 'chunk_size': 16}, 16),
        ({'name': 'flash_quad'}, 64),
        ({'name': 'transformer_plus_plus', 'attention_function': 'relu2', 'relative_bias': 'toeplitz'}, 64),
    ],
    ids=['flash', 'flash_quad', 'transformer'],
)
def test_a_table_starts_so_that_weights_are_scale_squared_over_n(fields, positions):
    for scale in ({}, {'relative_bias_scale': 0.5}):
        config, biases = relative_biases(**fields, relative_bias_init='mean', **scale)
        expected = scale.get('relative_bias_scale', 2.0)
        assert config.relative_bias_scale == expected
        for bias in biases:
            assert bias['table'].shape[-1] == 2 * positions - 1
            np.testing.assert_allclose(jnp.square(bias['table']), expected**2 / positions, rtol=1e-6)


def test_the_rotary_form_starts_near_the_same_bias_for_every_distance():
    from gau.ops.positions import rotary_bias

    # Whatever the length of the call that draws the parameters.
    fields = {'name': 'flash_quad', 'relative_bias': 'rotary', 'relative_bias_init': 'mean', 'context': 1024}
    config, biases = relative_biases(**fields, drawn_for=2)
    assert config.relative_bias_length == 1024
    for bias in biases:
        b_P = rotary_bias(bias['a'][0], bias['c'][0], 1024)
        start = config.relative_bias_scale / 1024**0.5
        assert abs(float(b_P.mean()) / start - 1) < 0.1
        assert float(b_P.std()) < 0.15 * start
        # The other pairs are drawn: with zeros in both vectors neither would ever get a gradient.
        assert int((bias['a'] == 0).sum()) == int((bias['c'] == 0).sum()) == 1


def test_the_default_is_the_better_start_but_with_su():
    resolved = [relative_biases(name='flash_quad', **fields)[0] for fields in ({}, {'normalizer': 'su'})]
    assert [config.relative_bias_init for config in resolved] == ['mean', 'normal']


def test_the_papers_start():
    config, biases = relative_biases(name='flash_quad', relative_bias_init='normal')
    assert (config.relative_bias_init, config.relative_bias_scale) == ('normal', None)
    assert all(0.01 < float(bias['table'].std()) < 0.03 for bias in biases)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'attention_function': 'softmax', 'relative_bias_init': 'mean'}, 'weights of relu2'),
        ({'relative_bias': 'none', 'relative_bias_init': 'mean'}, 'no relative bias'),
        ({'branches': 'global', 'relative_bias_init': 'mean'}, 'no local branch'),
        ({'relative_bias_init': 'normal', 'relative_bias_scale': 2.0}, 'relative_bias_init=mean'),
        ({'normalizer': 'su', 'relative_bias_init': 'mean'}, 'normalizer=su'),
        ({'relative_bias_init': 'mean', 'relative_bias_scale': 0.0}, 'positive'),
        ({'relative_bias_init': 'men'}, 'did you mean "mean"'),
    ],
    ids=lambda value: value if isinstance(value, str) else '-'.join(value),
)
def test_what_would_mean_nothing_is_refused(fields, message):
    config = default_config()
    config.update({'name': 'flash', 'size': 'tiny', **fields})
    with pytest.raises(UserError, match=message):
        resolve(config, causal=True, context=512)
