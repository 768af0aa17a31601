"""Parameters under stable names, and back."""

import jax
import numpy as np
import pytest

from gau.errors import UserError
from gau.models.weights import named, restored
from tests.models.tiny import CASES, make
from tests.training.tiny import assert_trees_equal


@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_every_model_comes_back_as_it_left(name, objective):
    _, params = make(name, objective, dtype='float32')
    assert_trees_equal(restored(named(params), params, where='OUT'), params)


def test_layouts_are_those_of_pytorch():
    _, params = make('flash', dtype='float32', output_layer='own')
    weights, unit = named(params), params['blocks_1']['gau']
    assert np.array_equal(weights['embedding.weight'], params['embedding']['kernel'])
    assert np.array_equal(weights['output.weight'], params['output']['kernel'])
    # nn.Linear: [outputs, inputs], the gate's outputs first.
    uv = np.concatenate([unit['uv']['kernel'][:, 0], unit['uv']['kernel'][:, 1]], axis=1).T
    assert np.array_equal(weights['blocks.1.gau.uv.weight'], uv)
    assert np.array_equal(weights['blocks.1.gau.uv.bias'], np.concatenate(unit['uv']['bias']))
    assert np.array_equal(weights['blocks.1.gau.out.weight'], unit['out']['kernel'].T)
    assert np.array_equal(weights['blocks.1.gau.query_key.gamma'], unit['query_key']['gamma'])
    # The output projection of heads reads them one after another.
    _, params = make('transformer_plus_plus', dtype='float32')
    kernel_HKD = params['blocks_0']['attention']['out']['kernel']
    assert np.array_equal(named(params)['blocks.0.attention.out.weight'], np.concatenate(kernel_HKD).T)


@pytest.mark.parametrize('name', ['flash', 'transformer_plus_plus'])
def test_scanned_layers_have_the_names_of_unrolled_ones(name):
    _, unrolled = make(name, dtype='float32')
    _, scanned = make(name, dtype='float32', layer_stack='scan')
    stacked = restored(named(unrolled), scanned, where='OUT')
    for layer, leaves in enumerate(zip(*map(list, jax.tree.leaves(stacked['blocks'])), strict=True)):
        for one, expected in zip(leaves, jax.tree.leaves(unrolled[f'blocks_{layer}']), strict=True):
            assert np.array_equal(one, expected)
    assert_trees_equal(restored(named(stacked), unrolled, where='OUT'), unrolled)


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'num_layers': 3}, 'blocks.2.gau.out.bias is absent there, and the new model needs it'),
        ({'num_layers': 1}, r'blocks.1.gau.out.bias is \[8\] there, and the new model has no such part'),
        ({'model_dim': 6}, r'embedding.weight is \[11, 8\] there and \[11, 6\] in the config'),
        ({'expansion_factor': 3.0}, r'blocks.0.gau.out.weight is \[8, 16\] there and \[8, 24\] in the config'),
        ({'absolute_position': 'none'}, r'position.scale is \[\] there, and the new model has no such part'),
    ],
)
def test_what_does_not_fit_is_named(fields, message):
    weights = named(make('flash', dtype='float32')[1])
    with pytest.raises(UserError, match=f'^OUT does not fit the config: {message}$'):
        restored(weights, make('flash', dtype='float32', **fields)[1], where='OUT')
