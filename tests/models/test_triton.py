"""Models of the fused kernels, run in Triton's interpreter in float32, against the reference in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.conftest import PLATFORM
from tests.models.layouts import stack_layers, unstack_layers
from tests.models.tiny import (
    compile_fast,
    expect_padding_to_reach_nothing,
    losses_and_gradients,
    make,
    positions_of,
    tokens,
)
from tests.numerics import max_error
from tests.programs import report

pytest.importorskip('triton')
pytestmark = pytest.mark.skipif(PLATFORM != 'cpu', reason='a GPU rounds float32 products of the rest of the model')

MODELS = [('flash', 'lm'), ('flash', 'mlm'), ('flash_quad', 'lm')]
# A gradient that is one number is a sum in which much cancels.
TOLERANCE, SCALAR_TOLERANCE = 2e-5, 1e-3
# Documents that begin and end inside chunks of 5, of one token, one over three chunks; padding between and behind.
IDS = jnp.asarray([[1, 2, 0, 4, 4, 4, 4, 4, 4, 4, 4, 5, 0]])
N = IDS.shape[1]


def single(tree):
    return jax.tree.map(lambda x: x.astype('float32'), tree)


@functools.cache
def models(name, objective, **fields):
    """The model in kernels, the reference, and parameters for both."""
    fields = {'context': N, 'num_layers': 1} | fields
    fused, params = make(name, objective, impl='triton', dtype='float32', **fields)
    reference, _ = make(name, objective, impl='reference', **fields)
    return fused, reference, single(params)


@functools.partial(compile_fast, static_argnums=0)
def outputs_and_gradients(model, params, sequence, weights, ids, positions):
    """Loss and logits, and the gradient of the loss of predicting the tokens themselves."""

    def loss(params):
        logits = model.apply({'params': params}, sequence, segment_ids_BN=ids, positions_BN=positions)
        logits = jnp.where(weights[..., None] > 0, logits, 0)
        nll = optax.softmax_cross_entropy_with_integer_labels(logits, sequence)
        return (nll * weights).sum(), logits

    return jax.value_and_grad(loss, has_aux=True)(params)


def expect_the_reference(fused, reference, params, ids, n=N):
    sequence, positions = tokens(2, n), None if ids is None else positions_of(ids)
    # Weights of every size, and none at padding.
    weights = (0.5 + jnp.arange(2 * n) % 3).reshape(2, n) * (1 if ids is None else ids > 0)
    exact = jax.tree.map(lambda x: x.astype('float64'), params)
    found = outputs_and_gradients(fused, params, sequence, weights.astype('float32'), ids, positions)
    wanted = outputs_and_gradients(reference, exact, sequence, weights, ids, positions)
    for a, b in zip(found[0], wanted[0], strict=True):
        assert a.dtype == jnp.float32
        assert b.dtype == jnp.float64
        assert max_error(a, b) < TOLERANCE
    paths = jax.tree_util.tree_leaves_with_path(found[1])
    for (path, leaf), expected in zip(paths, jax.tree.leaves(wanted[1]), strict=True):
        assert max_error(leaf, expected) < (TOLERANCE if leaf.ndim else SCALAR_TOLERANCE), path


@pytest.mark.parametrize('fields', [
    pytest.param({'decay_gate': 'scalar', 'short_convolution': 2, 'key_input': 'own'}, marks=pytest.mark.slow),
    {'key_input': 'shifted', 'decay_gate': 'scalar', 'global_reduction': 'sum', 'far_chunks': 2},
    pytest.param({'local_window': 2, 'decay_gate': 'scalar', 'chunk_size': 3}, marks=pytest.mark.slow),
    pytest.param({'rope': 'local', 'far_chunks': 2}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_gate_of_the_state_and_far_chunks_are_those_of_the_reference(fields):
    fused, reference, params = models('flash', 'lm', **fields)
    expect_the_reference(fused, reference, params, jnp.concatenate([IDS, jnp.ones_like(IDS)]))


@pytest.mark.parametrize(('name', 'objective'), MODELS)
def test_logits_losses_and_gradients_are_those_of_the_reference(name, objective):
    # One of two layers, since the second one reads what the first one adds, its bias too.
    fused, reference, params = models(name, objective, num_layers=2 if objective == 'mlm' else 1)
    # One row of segment ids for the whole batch.
    expect_the_reference(fused, reference, params, IDS)


ABLATIONS = [
    {'attention_function': 'softmax', 'relative_bias': 'none', 'gamma_init': 'ones', 'rope': 'none', 'chunk_size': 16},
    {'attention_function': 'laplace', 'relative_bias': 'rotary', 'norm_placement': 'post', 'rope': 'local'},
    {'normalizer': 'su', 'relative_bias': 'none', 'temperature': 'learned', 'chunk_size': 3},
    {'normalizer': 'visible', 'relative_bias': 'rotary', 'query_key_dim': 6, 'expansion_factor': 3.0},
]


@pytest.mark.parametrize('objective', ['lm', pytest.param('mlm', marks=pytest.mark.slow)])
@pytest.mark.parametrize('fields', [ABLATIONS[0], *(pytest.param(x, marks=pytest.mark.slow) for x in ABLATIONS[1:])])
def test_ablations_of_flash(fields, objective):
    fused, reference, params = models(name='flash', objective=objective, **fields)
    expect_the_reference(fused, reference, params, None, 8)


@pytest.mark.slow
@pytest.mark.parametrize('objective', ['lm', 'mlm'])
@pytest.mark.parametrize('fields', [
    {'normalizer': 'su', 'relative_bias': 'none', 'gate': 'none'},
    {'normalizer': 'paper', 'relative_bias': 'rotary', 'temperature': 'learned'},
    {'normalizer': 'visible', 'query_key_dim': 6},
    {'attention_function': 'softmax', 'relative_bias': 'rotary', 'temperature': 'learned'},
    {'attention_function': 'softmax_plus', 'gate': 'none'},
])  # fmt: skip
def test_ablations_of_flash_quad(fields, objective):
    fused, reference, params = models(name='flash_quad', objective=objective, **fields)
    expect_the_reference(fused, reference, params, IDS)


@pytest.mark.parametrize(('name', 'objective'), MODELS)
def test_the_future_reaches_nothing_and_all_of_the_past_can(name, objective):
    fused, _, params = models(name, objective)
    batch, n = 2, 10
    # Every token has a row of the embedding to itself, so a gradient by that row is one by the token.
    sequence, asked = jnp.arange(batch * n).reshape(batch, n), jnp.asarray([3, 6])
    model = fused.clone(vocab_size=batch * n)
    generator = np.random.default_rng(0)
    kernel = jnp.asarray(generator.standard_normal((batch * n, params['embedding']['kernel'].shape[1])), 'float32')

    def loss(kernel):
        h_BND = model.apply({'params': params | {'embedding': {'kernel': kernel}}}, sequence, method='hidden')
        return (h_BND[jnp.arange(batch), asked] * jnp.arange(1, 1 + h_BND.shape[-1])).sum()

    reach = np.abs(compile_fast(jax.grad(loss))(kernel)).sum(-1).reshape(batch, n)
    for row, t in enumerate(asked):
        assert reach[row, t] > 0
        if objective == 'lm':
            assert (reach[row, t + 1 :] == 0).all()
        else:
            assert (reach[row, 5:] > 0).mean() > 0.5
    # The second chunk reads the first; relu^2 alone shuts some of it out.
    assert (reach[1, :5] > 0).mean() >= (0.6 if name == 'flash' else 0.2)


# Both directions at padding: test_gated_chunks.
@pytest.mark.parametrize(('name', 'objective'), [('flash', 'lm'), ('flash_quad', 'lm')])
def test_poisoned_padding_reaches_nothing(name, objective):
    fused, _, params = models(name, objective)
    sequence = jnp.where(IDS > 0, tokens(1, N) % 10, 10)

    def loss(params):
        hidden = fused.apply({'params': params}, sequence, segment_ids_BN=IDS, method='hidden')
        return (jnp.where(IDS[..., None] > 0, hidden, 0) ** 2).sum(), hidden

    run = compile_fast(jax.value_and_grad(loss, has_aux=True))
    # Token 10 stands at padding only.
    poisoned = params | {'embedding': {'kernel': params['embedding']['kernel'].at[10].set(jnp.nan)}}
    clean, dirty = run(params), run(poisoned)
    assert np.isfinite(clean[0][1]).all()
    assert max_error(dirty, clean) == 0
    assert (clean[1]['embedding']['kernel'][10] == 0).all()


@pytest.mark.parametrize(('name', 'objective'), [('flash', 'mlm'), ('flash_quad', 'lm')])
def test_numbers_at_padding_reach_nothing_in_any_layer(name, objective):
    fused, _, params = models(name, objective)
    expect_padding_to_reach_nothing(fused, params, IDS)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['flash', pytest.param('flash_quad', marks=pytest.mark.slow)])
def test_scan_remat_and_the_fused_loss_change_nothing(name):
    fields = {'impl': 'triton', 'dtype': 'float32', 'context': 8}
    plain, params = make(name, **fields)
    other, _ = make(name, layer_stack='scan', remat='full', **fields)
    params, ids = single(params), jnp.asarray([[1] * 3 + [2] * 5])
    sequence, weights, packing = tokens(1, 8), jnp.ones((1, 8), 'float32'), (ids, positions_of(ids))
    losses, expected = losses_and_gradients(plain, params, sequence, weights, *packing)

    def loss(params):
        named = dict(zip(('segment_ids_BN', 'positions_BN'), packing, strict=True))
        return other.apply({'params': params}, sequence, sequence, weights, **named, method='weighted_loss')

    value, gradient = compile_fast(jax.value_and_grad(loss))(stack_layers(params))
    assert max_error(value, losses.sum()) < 1e-5
    assert max_error(unstack_layers(gradient), expected) < 1e-5


@pytest.mark.slow
def test_devices_that_share_the_batch_or_the_width_compute_the_same():
    found = report('tests.models.sharded_triton')
    assert len(found) == 9
    for case, difference in found.items():
        assert difference < 2e-6, case
