"""The gauntlet: what every variant has to pass, whichever fields and models there are (`tests.models.variants`).

Its numbers and gradients, who reaches whom, padding and documents, bfloat16, its decoding state and its training in
segments or the reason for none, its parameters as they are counted; and seconds to the first step, tokens/s and memory
by `gau.benchmarks`.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.benchmarks import cells, training
from gau.errors import UserError
from gau.models import counts, decoding, registry
from gau.models.architectures import ARCHITECTURES
from gau.models.families import cross
from gau.objectives import objective as objectives
from gau.training import config as training_config
from gau.training.recurrent import Recurrent
from tests.models import tiny
from tests.models.decoded import staircase
from tests.models.variants import LENGTHS, SAME_NUMBERS, variants
from tests.numerics import LAYOUTS, finite_difference, max_error

N = tiny.CONTEXT
# These run in CI: whole chunks from far away, several heads, no gate, a second sequence. The others are slow tests.
FIELDS = {'far_chunks', 'num_heads', 'gate', 'cross_heads'}
QUICK = {('flash', 'lm'), ('flash_quad', 'lm'), ('cross_flash', 'halves')}
# Places that hold a token: a document beside others, with holes; of a pair, whose halves are the documents.
HOLES = [LAYOUTS['packed'], LAYOUTS['holes']]
PAIRS = [[1] * 9 + [0] * 3 + [2] * 10 + [0] * 2, [1] * 12 + [2] * 12]


def _marks(variant):
    fields = [field for field, _ in variant.fields]
    quick = (variant.name, variant.objective) in QUICK and len(fields) == 1 and fields[0] in FIELDS
    return () if quick else pytest.mark.slow


ALL = variants()


@pytest.fixture(scope='module', params=[pytest.param(each, id=str(each), marks=_marks(each)) for each in ALL])
def variant(request):
    # A fixture of the module and no parameter: all tests of a variant stand together, and share what is made for it.
    return request.param


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    # Encoder-decoders are known to those alone who ask for them.
    for name in ('cross_flash', 'cross_transformer_plus_plus'):
        monkeypatch.setitem(ARCHITECTURES, name, None)
    cross.register()


@functools.lru_cache(maxsize=1)
def made(variant):
    return variant.make()


def batch(variant):
    """Tokens, weights, documents and positions, [2, N]."""
    ids = np.asarray(PAIRS if variant.objective == 'halves' else HOLES)
    weights = (ids == 2 if variant.objective == 'halves' else ids > 0) * np.asarray([[1.0], [0.5]])
    return tiny.tokens(2), jnp.asarray(weights), jnp.asarray(ids), tiny.positions_of(ids)


def test_losses_and_gradients_are_those_of_the_reference(variant):
    model, params = made(variant)
    sequence, weights, ids, positions = batch(variant)
    losses, gradient = tiny.losses_and_gradients(model, params, sequence, weights, ids, positions)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((losses, gradient)))
    if {'xla', 'reference'} <= set(ARCHITECTURES[variant.name].attention.implementations):
        reference = variant.build(impl='reference')
        expected = tiny.losses_and_gradients(reference, params, sequence, weights, ids, positions)
        assert max_error((losses, gradient), expected) < 1e-11
    # Along one direction the gradient is what the losses themselves say.
    leaves, tree = jax.tree.flatten(params)

    @tiny.compile_fast
    def loss(*leaves):
        options = {'segment_ids_BN': ids, 'positions_BN': positions, 'method': 'token_losses'}
        nll = model.apply({'params': jax.tree.unflatten(tree, leaves)}, sequence, sequence, **options)
        return jnp.where(weights != 0, nll * weights, 0).sum()

    slope, direction = finite_difference(loss, leaves, seed=1, epsilon=1e-7)
    found = sum((g * d).sum() for g, d in zip(jax.tree.leaves(gradient), direction, strict=True))
    assert abs(found - slope) < 1e-5 * abs(slope) + 1e-6


def test_who_sees_whom(variant):
    model, params = made(variant)
    sequence, first = tiny.tokens(2), N // 2 * (variant.objective == 'halves')
    ids = jnp.asarray(PAIRS) if first else None
    logits = tiny.apply(model, params, sequence, ids)
    # Within a chunk of five tokens and at its border; not by a gradient alone: a choice of chunks has none.
    before = []
    for t in (3, 5, 8):
        other = sequence.at[:, first + t :].set((sequence[:, first + t :] + 1) % tiny.VOCAB)
        changed = tiny.apply(model, params, other, ids)
        assert max_error(changed[:, t:], logits[:, t:]) > 1e-6
        before.append(max_error(changed[:, :t], logits[:, :t]))
    assert max(before) < 1e-13 if variant.causal else max(before) > 1e-6
    if first:
        # (relu^2 shuts many weights of parameters like these.)
        source = sequence.at[:, :first].add(1) % tiny.VOCAB
        assert (tiny.apply(model, params, source, ids) != logits).any(axis=-1)[:, :10].mean() > 0.1


def test_documents_and_padding_reach_nothing(variant):
    model, params = made(variant)
    sequence, weights, ids, positions = batch(variant)
    losses, gradient = tiny.losses_and_gradients(model, params, sequence, weights, ids, positions)
    other = (sequence + 3) % tiny.VOCAB
    # What is predicted at padding has no weight.
    at_padding = jnp.where(ids == 0, other, sequence)
    padded = tiny.losses_and_gradients(model, params, at_padding, weights, ids, positions)
    assert max_error((padded[0] * (weights > 0), padded[1]), (losses * (weights > 0), gradient)) == 0
    if variant.objective == 'halves':
        return
    # Every document as if all others were padding, with other tokens in them.
    total = jax.tree.map(jnp.zeros_like, params)
    for document in np.unique(ids[ids > 0]):
        mine = ids == document
        text = jnp.where(mine, sequence, other)
        alone = tiny.losses_and_gradients(model, params, text, weights * mine, ids * mine, positions)
        assert max_error(losses[mine], alone[0][mine]) < 1e-11
        total = jax.tree.map(jnp.add, total, alone[1])
    assert max_error(total, gradient) < 1e-11


def test_bfloat16_is_near_and_its_gradients_are_finite(variant):
    # The same numbers for both: parameters that float32 has.
    model, params = made(variant)
    params = jax.tree.map(lambda x: x.astype('float32'), params)
    sequence, weights, ids, positions = batch(variant)
    rounded = tiny.losses_and_gradients(variant.build(dtype='bfloat16'), params, sequence, weights, ids, positions)
    exact = tiny.losses_and_gradients(
        model, jax.tree.map(lambda x: x.astype('float64'), params), sequence, weights, ids, positions
    )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(rounded))
    seen = weights > 0
    error = np.abs(rounded[0][seen] - exact[0][seen]).mean() / exact[0][seen].std()
    assert error < 0.1, error


def test_it_decodes_or_says_why_not(variant):
    reason = ARCHITECTURES[variant.name].attention.refuses_decoding(variant.config())
    if not variant.causal:
        reason = 'a masked language model cannot be decoded: its tokens see later ones'
    if reason is not None:
        model = registry.build(variant.config(), vocab_size=tiny.VOCAB, causal=variant.causal)
        with pytest.raises(UserError, match=f'^{re.escape(reason)}$'):
            decoding.init_state(model, batch_size=1)
        return
    worst, size = staircase(*made(variant))
    assert size > 0.1
    assert worst < 1e-11


def test_rows_are_read_in_segments_or_it_says_why_not(variant):
    config = training_config.default_config()
    config.objective, config.model = variant.objective, variant.config()
    config.data.context, config.data.attend_across_documents = N, variant.objective == 'lm'
    config.optimizer.segment_tokens = 8
    attention = ARCHITECTURES[variant.name].attention
    if (
        variant.objective != 'lm'
        or attention.refuses_decoding(config.model)
        or attention.what_keeps_all_tokens(config.model)
    ):
        with pytest.raises(UserError, match=r'^optimizer\.segment_tokens=8 '):
            training_config.resolve(config)
        return
    training_config.resolve(config)
    model, params = made(variant)
    data = {'inputs': tiny.tokens(2), 'targets': tiny.tokens(2, seed=4), 'weights': jnp.ones((2, N))}
    whole, parts = (
        tiny.compile_fast(jax.value_and_grad(lambda params, own=own: own.loss(model, params, data)[0]))(params)
        for own in (objectives.load('lm'), Recurrent(objectives.load('lm'), 8))
    )
    assert max_error(parts, whole) < 1e-11


def test_it_is_counted_and_can_be_measured(variant):
    _, params = made(variant)
    config = variant.config()
    assert counts.parameters(config, vocab_size=tiny.VOCAB) == sum(leaf.size for leaf in jax.tree.leaves(params))
    spec = parsed(':'.join([variant.name, *(f'{field}={value}' for field, value in variant.fields)]), variant.objective)
    # At its full size, as `--quick` does not have it.
    cell = cells.Cell('train', spec, size='base', context=1024, batch_size=1, objective=variant.objective)
    measured = cell.model_config()
    assert all(measured[field] == value for field, value in variant.fields)
    assert cell.flops_per_token() > 0


def parsed(text, objective):
    """What `benchmark.py --models=` takes."""
    cells.check_objective(objective)
    (spec,) = cells.parse_spec(text, impls=['auto'], remat='none', layer_stack='unrolled')
    return spec


TINY = {'size': 'tiny', 'context': 32, 'batch_size': 2, 'vocab_size': 50, 'dtype': 'float32', 'effort': 'quick'}


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'objective'), [
    ('flash:far_chunks=2:chunk_size=8', 'lm'), ('flash_quad:num_heads=2:gate=none', 'lm'), ('flash:::::8', 'lm'),
    ('cross_flash:cross_heads=2', 'halves'), ('cross_transformer_plus_plus', 'halves'),
])  # fmt: skip
def test_the_first_step_the_speed_and_the_memory_are_measured(model, objective):
    spec, result = parsed(model, objective), {}
    with jax.enable_x64(False):
        training.measure_train(cells.Cell('train', spec, objective=objective, **TINY), result)
    assert result['trace_seconds'] + result['compile_seconds'] > 0
    assert len(result['seconds']) >= 10
    assert result['tokens'] == 64
    assert result['compiler_bytes'] > 4 * result['parameters']
    assert np.isfinite(result['loss'])


def test_every_field_that_changes_numbers_is_tried():
    """Or is the size of a table; a number that no model accepts beside its defaults would be left out in silence."""
    tried = {field for variant in ALL for field, _ in variant.fields}
    declared = {field for architecture in ARCHITECTURES.values() for field in architecture.fields}
    assert declared - LENGTHS - SAME_NUMBERS - tried == {'num_features'}
