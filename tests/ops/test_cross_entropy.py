import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import cross_entropy as module
from gau.ops.cross_entropy import cross_entropy, sliced_cross_entropy, weighted_cross_entropy
from gau.ops.kernels.cross_entropy import FUSED, slice_loss
from tests.numerics import max_error, normal

B, N, D, V = 2, 11, 4, 7


@pytest.mark.parametrize('positions_per_slice', [1, 4, 11, 100])
def test_slices_give_the_loss_and_its_gradients(positions_per_slice):
    h, embedding = normal(0, B, N, D), normal(1, V, D)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, N)))
    weights = normal(3, B, N)

    def loss(h, embedding, f):
        y = f(h, embedding, targets)
        return (y * weights).sum(), y

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2)
    expected = run(h, embedding, cross_entropy)
    sliced = run(h, embedding, lambda *x: sliced_cross_entropy(*x, positions_per_slice=positions_per_slice))
    assert max_error(sliced, expected) < 1e-13
    log_p = np.log(np.exp(h @ embedding.T) / np.exp(h @ embedding.T).sum(-1, keepdims=True))
    np.testing.assert_allclose(expected[0][1], -np.take_along_axis(log_p, targets[..., None], -1)[..., 0], atol=1e-12)


def test_all_logits_never_exist_at_once(monkeypatch):
    v, n = 4096, 64
    shapes = [jax.ShapeDtypeStruct(s, 'float32') for s in ((1, n, D), (v, D))]
    targets = jax.ShapeDtypeStruct((1, n), 'int32')

    def peak(positions_per_slice):
        f = jax.grad(
            lambda h, e, t: sliced_cross_entropy(h, e, t, positions_per_slice=positions_per_slice).sum(), (0, 1)
        )
        return jax.jit(f).lower(*shapes, targets).compile().memory_analysis().temp_size_in_bytes

    assert peak(n) >= n * v * 4
    assert peak(8) < n * v * 4 / 2
    # The promise does not hang on the length alone: nor with many rows or a large vocabulary within one slice.
    monkeypatch.setattr(module, 'MAX_LOGITS', n * v // 8)
    assert peak(n) < n * v * 4 / 2


def test_large_logits_are_computed_again_and_small_ones_are_kept(monkeypatch):
    h, embedding = normal(0, B, N, D), normal(1, V, D)
    targets = jnp.zeros((B, N), int)

    def kept():
        loss = lambda h, e: sliced_cross_entropy(h, e, targets, positions_per_slice=N)  # noqa: E731
        leaves = jax.tree.leaves(jax.eval_shape(lambda *x: jax.vjp(loss, *x)[1], h, embedding))
        return max(x.size for x in leaves)

    assert kept() >= B * N * V
    monkeypatch.setattr(module, 'SAVED_LOGITS', B * N * V - 1)
    assert kept() < B * N * V


@pytest.mark.parametrize(('limit', 'kept'), [(1, 0), (3 * B * V, 0), (2**26, 0), (2**26, 2**20)])
def test_the_bound_on_logits_changes_no_number(monkeypatch, limit, kept):
    h, embedding = normal(0, B, N, D), normal(1, V, D)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, N)))
    run = jax.jit(jax.value_and_grad(lambda h, e, f: (f(h, e, targets) ** 2).sum(), (0, 1)), static_argnums=2)
    monkeypatch.setattr(module, 'MAX_LOGITS', limit)
    monkeypatch.setattr(module, 'SAVED_LOGITS', kept)
    sliced = run(h, embedding, lambda *x: sliced_cross_entropy(*x, positions_per_slice=100))
    assert max_error(sliced, run(h, embedding, cross_entropy)) < 1e-13


def test_loss_is_float32_for_bfloat16():
    h, embedding = normal(0, B, N, D).astype(jnp.bfloat16), normal(1, V, D).astype(jnp.float32)
    assert sliced_cross_entropy(h, embedding, jnp.zeros((B, N), int), positions_per_slice=4).dtype == jnp.float32


def weighted_inputs(seed=0, dtype='float64'):
    """Hidden states and embedding as `dtype` can hold them, targets, and weights of which a third is 0."""
    h = normal(seed, B, N, D).astype(dtype).astype('float64')
    embedding = normal(seed + 1, V, D).astype(dtype).astype('float64')
    generator = np.random.default_rng(seed)
    weights = generator.uniform(0.1, 2, (B, N)) * (generator.random((B, N)) > 0.3)
    return h, embedding, jnp.asarray(generator.integers(0, V, (B, N))), jnp.asarray(weights)


@jax.jit
@functools.partial(jax.value_and_grad, argnums=(0, 1))
def reference(h, embedding, targets, weights):
    """The weighted loss and its gradients by the plain formula."""
    return (cross_entropy(h, embedding, targets) * weights).sum()


# Of the largest number: float32 sums in another order; bfloat16 rounds each d logits and each d h to 8 bits.
@pytest.mark.parametrize(('dtype', 'value_bound', 'gradient_bound'), [
    ('float64', 1e-14, 1e-14), ('float32', 1e-6, 1e-6), ('bfloat16', 1e-6, 2**-8),
])  # fmt: skip
@pytest.mark.parametrize('positions_per_slice', [1, 4, 100])
def test_hand_written_gradient(dtype, value_bound, gradient_bound, positions_per_slice):
    h, embedding, targets, weights = weighted_inputs(dtype=dtype)
    expected, gradients = reference(h, embedding, targets, weights)

    @jax.jit
    def run(h, embedding):
        weighted = weights.astype(jnp.promote_types(dtype, 'float32'))
        # The factor stands for what the loss is divided by: the gradient that comes in is not 1.
        loss = lambda *x: 3 * weighted_cross_entropy(*x, targets, weighted, positions_per_slice=positions_per_slice)  # noqa: E731
        return loss(h, embedding), jax.value_and_grad(loss, (0, 1))(h, embedding)

    parameter_dtype = jnp.promote_types(dtype, 'float32')
    alone, (loss, (dh, de)) = run(h.astype(dtype), embedding.astype(parameter_dtype))
    assert (loss.dtype, dh.dtype, de.dtype) == (parameter_dtype, dtype, parameter_dtype)
    assert max_error(alone, 3 * expected) < value_bound, 'not differentiated'
    assert max_error(loss, 3 * expected) < value_bound
    assert max_error(np.asarray(dh, 'float64'), 3 * gradients[0]) < gradient_bound
    assert max_error(de, 3 * gradients[1]) < gradient_bound


def test_rounding_d_logits_averages_out_over_positions():
    """d E of many positions in bfloat16 is closer than the rounding of one position's d logits, 2^-9."""
    n, d, v = 512, 16, 64
    h, embedding = normal(0, 4, n, d).astype('bfloat16'), normal(1, v, d).astype('bfloat16').astype('float32')
    targets = jnp.asarray(np.random.default_rng(2).integers(0, v, (4, n)))
    weights = jnp.ones((4, n), 'float32')
    loss = functools.partial(weighted_cross_entropy, positions_per_slice=64)
    found = jax.jit(jax.grad(loss, 1))(h, embedding, targets, weights)
    wide = (x.astype('float64') for x in (h, embedding))
    expected = reference(*wide, targets, weights)[1][1]
    assert float(jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)) < 2**-10


@pytest.mark.parametrize('weighted', ['some', 'none'])
def test_what_stands_at_weight_zero_reaches_nothing(weighted):
    h, embedding, targets, weights = weighted_inputs()
    weights = weights if weighted == 'some' else jnp.zeros_like(weights)
    run = jax.jit(jax.value_and_grad(functools.partial(weighted_cross_entropy, positions_per_slice=4), (0, 1)))
    clean = run(h, embedding, targets, weights)
    poisoned = run(jnp.where(weights[..., None] == 0, jnp.nan, h), embedding, targets, weights)
    jax.tree.map(np.testing.assert_array_equal, poisoned, clean)
    assert (np.asarray(clean[1][0])[np.asarray(weights) == 0] == 0).all()
    if weighted == 'none':
        assert max(np.abs(x).max() for x in jax.tree.leaves(clean)) == 0
    # What counts is not hidden: a diverged model has to show.
    broken = run(h.at[0, np.flatnonzero(weights[0])[:1]].set(jnp.nan), embedding, targets, weights)
    assert np.isnan(broken[0]) == (weighted == 'some')


def test_weighted_loss_never_holds_all_logits_and_computes_them_once():
    v, n = 4096, 64
    shapes = [jax.ShapeDtypeStruct(s, 'float32') for s in ((1, n, D), (v, D))]
    rest = jax.ShapeDtypeStruct((1, n), 'int32'), jax.ShapeDtypeStruct((1, n), 'float32')

    def run(positions_per_slice):
        loss = functools.partial(weighted_cross_entropy, positions_per_slice=positions_per_slice)
        return jax.value_and_grad(loss, (0, 1))

    def peak(positions_per_slice):
        compiled = jax.jit(run(positions_per_slice)).lower(*shapes, *rest).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert peak(n) >= n * v * 4
    assert peak(8) < n * v * 4 / 2
    assert str(jax.make_jaxpr(run(8))(*shapes, *rest)).count('dot_general[') == 3, 'logits, d h and d E'


def test_the_kernels_logits_are_nearer_than_those_of_a_rounded_embedding():
    pytest.importorskip('triton')
    v, d = 300, 64
    h, embedding = 4 * normal(0, B, N, d).astype(jnp.bfloat16), normal(1, v, d).astype(jnp.float32)
    # Some tokens are sure of their target, as far as a logit of about 100 can be.
    targets = jnp.asarray(np.random.default_rng(2).integers(0, v, (B, N)))
    h = h.at[:, ::2].set((2 * embedding[targets[:, ::2]]).astype(jnp.bfloat16))
    weights = jnp.ones((B, N), jnp.float32)

    def run(h, embedding, impl):
        f = functools.partial(weighted_cross_entropy, positions_per_slice=4, slice_loss=slice_loss(impl, v))
        return jax.jit(jax.value_and_grad(lambda *x: f(*x, targets, weights), (0, 1)))(h, embedding)

    exact = run(h.astype('float64'), embedding.astype('float64'), 'xla')
    errors = {}
    for impl in ('triton', 'xla'):
        pairs = zip(*map(jax.tree.leaves, (run(h, embedding, impl), exact)), strict=True)
        errors[impl] = [max_error(np.asarray(a, 'float64'), b) for a, b in pairs]
    # The loss, d h and d E.
    assert all(a < b for a, b in zip(errors['triton'], errors['xla'], strict=True)), errors
    assert errors['triton'][0] < 1e-4


@pytest.mark.filterwarnings('ignore:invalid value encountered')
@pytest.mark.parametrize('where', ['h', 'embedding', 'logits'])
def test_what_no_float16_holds_is_a_large_number_and_not_infinite(where):
    pytest.importorskip('triton')
    # Positive, since a CPU sums in float16: of both infinities it would make NaN.
    h, embedding = jnp.abs(normal(0, B, N, D)), jnp.abs(normal(1, V, D))
    factors = {'h': (1e6, 1), 'embedding': (1, 1e6), 'logits': (1e3, 1e3)}[where]
    h, embedding = (factor * x for factor, x in zip(factors, (h, embedding), strict=True))
    h, embedding = h.astype(jnp.bfloat16), embedding.astype(jnp.float32)
    targets, weights = jnp.zeros((B, N), int), jnp.ones((B, N), jnp.float32)
    loss = functools.partial(weighted_cross_entropy, positions_per_slice=4, slice_loss=FUSED)
    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, gradients = run(h, embedding, targets, weights)
    assert np.isfinite(value)
    assert all(np.isfinite(np.asarray(x, 'float64')).all() for x in gradients)
    # A NaN is none of these.
    assert np.isnan(run(h.at[0, 0, 0].set(jnp.nan), embedding, targets, weights)[1][1]).any()
