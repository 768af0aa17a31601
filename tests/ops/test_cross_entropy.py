import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.ops import cross_entropy as module
from gau.ops.cross_entropy import cross_entropy, sliced_cross_entropy
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

    run = jax.value_and_grad(loss, (0, 1), has_aux=True)
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
    monkeypatch.setattr(module, 'KEPT_LOGITS', B * N * V - 1)
    assert kept() < B * N * V


@pytest.mark.parametrize(('limit', 'kept'), [(1, 0), (3 * B * V, 0), (2**26, 0), (2**26, 2**20)])
def test_the_bound_on_logits_changes_no_number(monkeypatch, limit, kept):
    h, embedding = normal(0, B, N, D), normal(1, V, D)
    targets = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, N)))
    run = jax.value_and_grad(lambda h, e, f: (f(h, e, targets) ** 2).sum(), (0, 1))
    monkeypatch.setattr(module, 'MAX_LOGITS', limit)
    monkeypatch.setattr(module, 'KEPT_LOGITS', kept)
    sliced = run(h, embedding, lambda *x: sliced_cross_entropy(*x, positions_per_slice=100))
    assert max_error(sliced, run(h, embedding, cross_entropy)) < 1e-13


def test_loss_is_float32_for_bfloat16():
    h, embedding = normal(0, B, N, D).astype(jnp.bfloat16), normal(1, V, D).astype(jnp.float32)
    assert sliced_cross_entropy(h, embedding, jnp.zeros((B, N), int), positions_per_slice=4).dtype == jnp.float32
