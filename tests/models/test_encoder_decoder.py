"""Encoder-decoders: causal in the target, closed to padding, counted, the same on four devices, and not decoded."""

import functools
import json
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import cross as study
from gau.errors import UserError
from gau.layers.common import Source, TokenInfo
from gau.models import counts, decoding, encoder_decoder, registry
from gau.models.blocks import Block
from gau.models.config import resolve
from gau.models.families import cross
from gau.models.target import Target
from gau.objectives import objective as objectives
from gau.training import mesh as meshes
from tests.models import tiny
from tests.numerics import max_error, normal, random_like
from tests.programs import report

NAMES = ['cross_flash', 'cross_transformer_plus_plus']
HALF = tiny.CONTEXT // 2
# Source and target, padded on their right.
IDS = np.asarray([[1] * 9 + [0] * 3 + [2] * 10 + [0] * 2, [1] * 12 + [2] * 12])


@pytest.fixture(autouse=True)
def registered():
    cross.register()


@functools.cache
def make(name, **fields):
    """A model and its parameters, of order 1."""
    cross.register()
    config = tiny.tiny_config(name, **{'cross_heads': 2, **fields})
    model = encoder_decoder.build(config, vocab_size=tiny.VOCAB, target=Target('cpu'))
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int))['params']
    return model, random_like(shapes, 0)


@pytest.mark.slow
@pytest.mark.parametrize('name', NAMES)
def test_the_target_is_causal_and_padding_reaches_nothing(name):
    model, params = make(name)
    sequence = tiny.tokens(2)
    logits = tiny.apply(model, params, sequence, IDS)
    assert logits.shape == (2, HALF, tiny.VOCAB)
    # From token 5 of the target on, and at all padding of both: 10 real tokens stand in the first row's target.
    other = sequence.at[:, HALF + 5 :].add(1) % tiny.VOCAB
    other = jnp.where(IDS == 0, (other + 3) % tiny.VOCAB, other)
    changed = tiny.apply(model, params, other, IDS)
    np.testing.assert_array_equal(changed[:, :5], logits[:, :5])
    assert (changed[:, 5:10] != logits[:, 5:10]).any(axis=-1).all()
    # Every token of the target reads the source's last one.
    last = sequence.at[jnp.arange(2), jnp.asarray([8, 11])].add(1) % tiny.VOCAB
    assert (tiny.apply(model, params, last, IDS) != logits).any(axis=-1)[:, :10].all()
    # Losses stand where the targets do.
    nll, gradient = tiny.losses_and_gradients(model, params, sequence, (IDS == 2) * 1.0, IDS)
    assert (nll[:, :HALF] == 0).all()
    expected = -jnp.take_along_axis(jax.nn.log_softmax(logits), sequence[:, HALF:, None], -1)[..., 0]
    assert max_error(nll[:, HALF:], expected) < 1e-12
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    summed = model.apply({'params': params}, sequence, sequence, (IDS == 2) * 1.0, segment_ids_BN=IDS,
                         method='weighted_loss')  # fmt: skip
    assert float(summed) == pytest.approx(float((nll * (IDS == 2)).sum()))
    # A row of fewer places with the same pair.
    alone = tiny.apply(model, params, jnp.concatenate([sequence[:1, :9], sequence[:1, HALF : HALF + 9]], axis=1))
    assert max_error(alone, logits[:1, :9]) < 1e-12


def plain_transformer(params, tokens_N, ids_N, heads, scale):
    """Logits of the target of one row, of a pre-norm encoder-decoder in its textbook form, without its padding."""
    half = len(tokens_N) // 2
    matrix = params['decoder']['embedding']['kernel']

    def norm(x, own):
        centred = x - x.mean(-1, keepdims=True)
        return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * own['scale'] + own['bias']

    def dense(x, own):
        return jnp.tensordot(x, own['kernel'], own['kernel'].ndim - own['bias'].ndim) + own['bias']

    def rotated(x_NK):
        width = x_NK.shape[1] // 2
        angles = np.arange(len(x_NK))[:, None] * 10_000.0 ** (-np.arange(width) / width)
        turned = (x_NK[:, :width] + 1j * x_NK[:, width:]) * jnp.exp(1j * angles)
        return jnp.concatenate([turned.real, turned.imag], axis=1)

    def attention(queries_keys_values, out, visible_NM, rope):
        outputs = []
        for head in range(heads):
            q, k, v = (x[:, head] for x in queries_keys_values)
            q, k = (rotated(q), rotated(k)) if rope else (q, k)
            scores_NM = jnp.where(visible_NM, q @ k.T / q.shape[1] ** 0.5, -jnp.inf)
            outputs.append(jax.nn.softmax(scores_NM, axis=1) @ v)
        return jnp.tensordot(jnp.stack(outputs, axis=1), out['kernel'], 2) + out['bias']

    def stack(side, tokens, source_MD):
        x, n = scale * matrix[tokens], len(tokens)
        visible = np.ones((n, n), bool) if source_MD is None else np.tri(n, dtype=bool)
        for layer in range(sum(name.startswith('blocks') for name in side)):
            own = side[f'blocks_{layer}']
            qkv = jnp.moveaxis(dense(norm(x, own['attention_norm']), own['attention']['qkv']), 1, 0)
            x = x + attention(qkv, own['attention']['out'], visible, rope=True)
            if source_MD is not None:
                q = dense(norm(x, own['cross_norm']), own['cross']['q'])[:, 0]
                kv = jnp.moveaxis(dense(source_MD, own['cross']['kv']), 1, 0)
                x = x + attention([q, *kv], own['cross']['out'], True, rope=False)
            h = dense(norm(x, own['feed_forward_norm']), own['feed_forward']['in'])
            x = x + dense(jax.nn.gelu(h[:, 0]) * h[:, 1], own['feed_forward']['out'])
        return norm(x, side['final_norm'])

    source, target = (tokens_N[side][ids_N[side] > 0] for side in (slice(half), slice(half, None)))
    h_MD = stack(params['encoder'], source, None)
    return stack(params['decoder'], target, h_MD) @ matrix.T


@pytest.mark.parametrize(
    ('row', 'scale', 'factor'), [(0, 'width', 8**0.5), pytest.param(1, 'none', 1, marks=pytest.mark.slow)]
)
def test_the_transformer_is_the_textbook_s(row, scale, factor):
    """Logits and all gradients, the encoder's among them."""
    model, params = make(NAMES[1], absolute_position='none', embedding_scale=scale)
    tokens_N, ids_N = tiny.tokens(2)[row], IDS[row]
    real = np.flatnonzero(ids_N[HALF:])
    cotangent = normal(5, len(real), tiny.VOCAB)

    def of_model(params):
        return model.apply({'params': params}, tokens_N[None], segment_ids_BN=ids_N[None])[0, real]

    def of_formula(params):
        return plain_transformer(params, tokens_N, ids_N, 2, factor)

    (found, gradients), (expected, of_textbook) = (
        tiny.compile_fast(lambda params, f=f: (f(params), jax.vjp(f, params)[1](cotangent)[0]))(params)
        for f in (of_model, of_formula)
    )
    assert max_error(found, expected) < 1e-12
    assert max_error(gradients, of_textbook) < 1e-12
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients['encoder']):
        assert np.abs(leaf).max() > 1e-6, path


@pytest.mark.parametrize('name', [NAMES[0], pytest.param(NAMES[1], marks=pytest.mark.slow)])
def test_gradients_of_a_block_of_the_decoder_are_causal(name):
    # No relu, so that no derivative is 0 by chance.
    model, params = make(name, cross_function='softmax', attention_function='softmax')
    positions_BN = jnp.arange(HALF)[None]
    rope = registry.build(model.config, vocab_size=tiny.VOCAB, causal=True).apply(
        {'params': params['decoder']}, positions_BN, method='_rope_tables'
    )
    block = Block(model.config, 0, True, model.implementation)
    ids_BM = jnp.asarray([[1] * 4 + [0] * 3])

    def output(x_BND, h_BMD):
        info = TokenInfo(None, positions_BN, rope, source=Source(h_BMD, ids_BM))
        y_BND, _ = block.apply({'params': params['decoder']['blocks_0']}, x_BND, info, True)
        return y_BND[0].sum(-1)

    d = model.config.model_dim
    to_target, to_source = jax.jit(jax.jacobian(output, (0, 1)))(normal(0, 1, HALF, d), normal(1, 1, 7, d))
    reaches = (to_target != 0).any(axis=(1, 3))
    np.testing.assert_array_equal(reaches, np.tri(HALF, dtype=bool))
    reads = (to_source != 0).any(axis=(1, 3))
    assert reads[:, :4].all()
    assert not reads[:, 4:].any()


def test_tokens_outweigh_at_the_start_what_all_places_are_given_alike():
    """Of the study's Transformer: otherwise its source makes it worse than none (docs/results/cross.md)."""
    config = study.get_config(f'model={NAMES[1]},size=tiny,data=embedded').model
    config.dtype = 'float32'
    config = resolve(config, causal=True, context=128)
    model = encoder_decoder.build(config, vocab_size=500, target=Target('cpu'))
    tokens_BN = jnp.asarray(np.random.default_rng(0).integers(0, 500, (2, 128)))
    params = nn.unbox(tiny.compile_fast(model.init)(jax.random.key(0), tokens_BN[:, :4]))
    _, kept = model.apply(params, tokens_BN, method='hidden', capture_intermediates=True)
    encoder, decoder = kept['intermediates']['encoder'], kept['intermediates']['decoder']

    def size(x):
        return float(jnp.sqrt(jnp.square(x).mean()))

    encoded_BMD = encoder['final_norm']['__call__'][0]
    assert size(encoded_BMD.mean(axis=1)) < 0.5 * size(encoded_BMD)
    begun, _ = model.apply(params, tokens_BN, method=lambda model, x: (model.decoder.embedded(x), None))
    assert size(decoder['blocks_0']['cross']['__call__'][0]) < 0.5 * size(begun)


@pytest.mark.slow
def test_a_model_without_cross_attention_sees_no_source():
    model, params = tiny.make('flash', num_layers=1)
    sequence, positions = tiny.tokens(2), jnp.tile(jnp.arange(HALF), 2)[None]
    logits = tiny.apply(model, params, sequence, IDS, jnp.broadcast_to(positions, IDS.shape))
    other = sequence.at[:, :HALF].add(1) % tiny.VOCAB
    changed = tiny.apply(model, params, other, IDS, jnp.broadcast_to(positions, IDS.shape))
    assert max_error(changed[:, HALF:], logits[:, HALF:]) < 1e-12


@pytest.mark.slow
def test_parameters_are_those_of_the_built_models():
    for name in NAMES:
        for fields in (
            {},
            {'cross_unit': 'gau'},
            {'cross_unit': 'multi_head', 'cross_function': 'relu2', 'num_layers': 3},
            {'norm_placement': 'post', 'short_convolution': 2},
            {'output_layer': 'own', 'absolute_position': 'none', 'norm_placement': 'sandwich'},
        ):
            model, params = make(name, **fields)
            count = counts.parameters(model.config, vocab_size=tiny.VOCAB)
            assert count == sum(leaf.size for leaf in jax.tree.leaves(params)), (name, fields)


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'unit'), [(NAMES[0], 'gau'), (NAMES[1], 'multi_head')])
def test_flops_are_those_xla_counts(name, unit):
    context, vocab_size, d = 256, 512, 256
    own = {'cross_flash': {'chunk_size': 64, 'query_key_dim': 128}, 'cross_transformer_plus_plus': {'head_dim': 128}}
    fields = {'model_dim': d, 'num_layers': 1, 'dtype': 'float32', 'impl': 'xla', 'cross_unit': unit, **own[name]}
    config = tiny.tiny_config(name, context=context, **fields)
    model = encoder_decoder.build(config, vocab_size=vocab_size, target=Target('cpu'))
    variables = jax.eval_shape(lambda key: nn.unbox(model.init(key, jnp.zeros((1, 8), int))), jax.random.key(0))
    sequence = jax.ShapeDtypeStruct((1, context), jnp.int32)
    analysis = jax.jit(model.apply).lower(variables, sequence).cost_analysis()
    vocabulary = SimpleNamespace(vocab_size=vocab_size)
    expected = objectives.load('halves').flops_per_token(config, context=context, tokenizer=vocabulary)
    # XLA also counts what is no matrix product, and of causal matrices both halves.
    assert 1 <= analysis['flops'] / context / expected < 1.15


@pytest.mark.parametrize(('fields', 'message'), [
    ({'cross_heads': 3}, 'model.cross_heads=3 does not divide model_dim = 8'),
    ({'layer_stack': 'scan'}, 'needs layers that are alike: cross_flash reads in every second'),
    ({'short_convolution': 3}, 'model.short_convolution=3 must be even: the encoder has it too'),
    ({'decay_gate': 'scalar'}, 'model.decay_gate=scalar is of causal models'),
    ({'objective': 'mlm'}, 'cross_flash reads a source: train it with objective=halves or titles'),
], ids=str)  # fmt: skip
def test_what_goes_not_together_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny.tiny_config('cross_flash', **fields)


def test_its_shards_are_halves():
    mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), ('data', 'fsdp', 'tensor', 'sequence'))
    options = {'batch_size': 2, 'model': tiny.tiny_config('cross_flash')}
    meshes.check_batch(mesh, context=40, **options)
    with pytest.raises(UserError, match='a device must hold a multiple of 10 for cross_flash'):
        meshes.check_batch(mesh, context=24, **options)


def test_decoding_is_refused_in_one_line():
    model = registry.build(tiny.tiny_config('cross_flash'), vocab_size=tiny.VOCAB, causal=True)
    with pytest.raises(UserError, match=r'^cross_flash cannot be decoded: no decoding state holds the source'):
        decoding.init_state(model, batch_size=1)


@pytest.mark.slow
def test_devices_share_it():
    """Loss and gradients on four simulated devices: of rows and widths, and of rows and tokens."""
    found = report('tests.models.test_encoder_decoder')
    assert len(found) == 4
    assert max(found.values()) < 1e-12


@pytest.mark.slow
def test_layers_may_be_computed_again_and_scanned_where_they_are_alike():
    model, params = make(NAMES[1])
    again, _ = make(NAMES[1], remat='full')
    batch = tiny.tokens(2), (IDS == 2) * 1.0, IDS
    expected = tiny.losses_and_gradients(model, params, *batch)
    assert max_error(tiny.losses_and_gradients(again, params, *batch), expected) < 1e-12
    scanned, _ = make(NAMES[1], layer_stack='scan')
    stacked = {}
    for side, own in params.items():
        layers = [own[f'blocks_{i}'] for i in range(2)]
        rest = {key: value for key, value in own.items() if not key.startswith('blocks')}
        stacked[side] = rest | {'blocks': jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}
    logits = [tiny.apply(*each, tiny.tokens(2), IDS) for each in ((scanned, stacked), (model, params))]
    assert max_error(*logits) < 1e-12


def main() -> None:
    """Prints the largest relative difference between four devices and one, for each model and mesh."""
    found = {}
    for name in NAMES:
        more = {'feed_forward_dim': 20} if name == NAMES[1] else {'chunk_size': 3}
        model, params = make(name, **more)
        model = model.clone(vocab_size=12)
        kernel = params['decoder']['embedding']['kernel']
        params['decoder']['embedding']['kernel'] = jnp.pad(kernel, ((0, 1), (0, 0)), constant_values=0.1)
        boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), int))['params']
        batch = tiny.tokens(2), (IDS == 2) * 1.0, IDS

        def loss(params, sequence, weights, ids, model=model):
            return model.apply(
                {'params': params}, sequence, sequence, weights, segment_ids_BN=ids, method='weighted_loss'
            )

        alone = tiny.compile_fast(jax.value_and_grad(loss))(params, *batch)
        for shape in ((2, 1, 2, 1), (1, 2, 1, 2)):
            types = (jax.sharding.AxisType.Auto,) * 4
            mesh = jax.make_mesh(shape, ('data', 'fsdp', 'tensor', 'sequence'), axis_types=types)
            placed = jax.device_put(params, meshes.shardings(boxed, mesh))
            with jax.set_mesh(mesh), nn.logical_axis_rules(meshes.AXIS_RULES):
                step = tiny.compile_fast(jax.value_and_grad(lambda *args, loss=loss: loss(*args)))
                shared = step(placed, *jax.device_put(batch, meshes.batch_sharding(mesh)))
            found[f'{name} {shape}'] = max_error(shared, alone)
    print(json.dumps(found))


if __name__ == '__main__':
    jax.config.update('jax_enable_x64', True)
    jax.config.update('jax_num_cpu_devices', 4)
    main()
