import functools
import os
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from gau.errors import UserError
from gau.layers import quadratic
from gau.models.architectures import ARCHITECTURES
from gau.models.attentions.mixed_chunk import MixedChunk
from gau.models.attentions.record import Needs
from gau.models.config import declared_fields
from gau.models.implementations import settle
from gau.models.registry import build
from gau.models.target import Implementation, Target
from gau.ops.cross_entropy import REFERENCE
from gau.ops.kernels.cross_entropy import FUSED as FUSED_LOSS
from gau.ops.kernels.cross_entropy import slice_loss
from tests.models.tiny import CAUSAL, apply, make, tiny_config, tokens
from tests.numerics import LAYOUTS, max_error

IMPLEMENTATIONS = {'triton', 'cudnn', 'splash', 'pallas', 'xla', 'reference'}
CPU, TPU, HOPPER = Target('cpu'), Target('tpu'), Target('gpu', (9, 0), triton=True)
INTERPRETER = Target('cpu', triton=True, interpreted=True)


@pytest.mark.parametrize('name', CAUSAL)
def test_auto_on_a_cpu_is_xla_where_there_is_one(name):
    config = tiny_config(name)
    assert config.impl == 'auto'
    expected = Implementation('reference' if name == 'combiner' else 'xla')
    assert settle(config, target=CPU) == expected
    assert build(config, vocab_size=3, causal=True, target=CPU).implementation == expected
    assert config.impl == 'auto', 'the config itself says what was asked for'


def test_what_was_chosen_is_taken():
    assert settle(tiny_config('flash', impl='reference'), target=CPU).attention == 'reference'


def test_auto_takes_the_first_that_works_and_a_choice_that_does_not_is_refused(monkeypatch):
    def lacks(config, target):
        return None if target.compute_capability == (9, 0) else f'a Hopper GPU, this is {target.platform}'

    class Fast(MixedChunk):
        implementations = {'fast': Needs(lacks)} | MixedChunk.implementations

    monkeypatch.setitem(ARCHITECTURES, 'flash', ARCHITECTURES['flash']._replace(attention=Fast()))
    config = tiny_config('flash')
    assert settle(config, target=HOPPER).attention == 'fast'
    assert settle(config, target=TPU).attention == 'xla'
    config.impl = 'fast'
    with pytest.raises(UserError, match=r'^model.impl=fast needs a Hopper GPU, this is tpu$'):
        settle(config, target=TPU)


def test_an_unknown_implementation_is_refused_wherever_it_is_named():
    config = tiny_config('flash')
    config.impl = 'xal'
    with pytest.raises(
        UserError, match=r'^model.impl=xal does not exist for flash; choose from triton, pallas, xla, reference$'
    ):
        settle(config, target=CPU)
    model, params = make('flash', num_layers=1)
    for name in ('flash', 'flash_quad', 'performer', 'linformer'):
        model, params = make(name, 'mlm', num_layers=1)
        wrong = model.clone(implementation=Implementation('xal'))
        with pytest.raises(ValueError, match="'xal' does not exist; choose from reference, xla"):
            wrong.apply({'params': params}, tokens())
    model, params = make('combiner', 'mlm', num_layers=1)
    with pytest.raises(ValueError, match="'xal' does not exist; choose from reference"):
        model.clone(implementation=Implementation('xal')).apply({'params': params}, tokens())
    with pytest.raises(ValueError, match="'xal' does not exist; choose from xla, recomputed, triton"):
        model.clone(implementation=Implementation('reference', norm='xal')).apply({'params': params}, tokens())
    with pytest.raises(ValueError, match="'xal' does not exist; choose from xla, triton"):
        slice_loss('xal', 11)


def test_every_choice_of_impl_is_some_records():
    named = {impl for architecture in ARCHITECTURES.values() for impl in architecture.attention.implementations}
    assert named == set(declared_fields()['impl'].choices) - {'auto'} == IMPLEMENTATIONS


@pytest.mark.parametrize(('attributes', 'expected'), [
    ({'platform': 'gpu', 'compute_capability': '9.0'}, Target('gpu', (9, 0), 2)),
    ({'platform': 'gpu', 'compute_capability': '12.1'}, Target('gpu', (12, 1), 2)),
    ({'platform': 'gpu', 'compute_capability': 'gfx942'}, Target('gpu', None, 2)),
    ({'platform': 'tpu'}, Target('tpu', None, 2)),
], ids=str)  # fmt: skip
def test_target_of_a_device(attributes, expected):
    assert Target.of_device(SimpleNamespace(**attributes), sequence_shards=2)[:3] == expected[:3]


def test_the_default_target_is_the_device_at_hand():
    assert Target.of_device(jax.devices()[0])[:3] == CPU[:3]
    assert Target.of_device(jax.devices()[0]).interpreted == (os.environ.get('TRITON_INTERPRET') == '1')


FUSED = {'dtype': 'bfloat16', 'model_dim': 32}


@pytest.mark.parametrize('name', ['transformer', 'transformer_plus', 'transformer_plus_plus'])
def test_softmax_attention_on_a_gpu_is_cudnn(name):
    for fields in ({}, {'temperature': 'learned'}, {'num_heads': 4}):
        assert settle(tiny_config(name, **FUSED, **fields), target=HOPPER).attention == 'cudnn'
    assert settle(tiny_config(name, **FUSED), target=TPU).attention == 'xla', 'heads are too narrow'


@pytest.mark.parametrize('name', ['transformer', 'transformer_plus', 'transformer_plus_plus'])
def test_softmax_attention_on_a_tpu_is_splash_and_nowhere_else(name):
    wide = {'dtype': 'bfloat16', 'model_dim': 128, 'num_heads': 2}
    for fields in ({}, {'temperature': 'learned'}, {'dtype': 'float32'}):
        # No kernels of Triton with it, whatever is installed.
        for target in (TPU, TPU._replace(triton=True), TPU._replace(sequence_shards=4)):
            assert settle(tiny_config(name, **wide | fields), target=target) == Implementation('splash')
    config, interpreter = tiny_config(name, **wide), CPU._replace(pallas_interpreted=True)
    for target in (CPU, HOPPER, interpreter):
        assert settle(config, target=target).attention != 'splash'
    config.impl = 'splash'
    assert settle(config, target=interpreter) == Implementation('splash')


@pytest.mark.parametrize(('fields', 'target', 'reason'), [
    ({}, CPU, 'a TPU, this is cpu'),
    ({}, HOPPER, 'a TPU, this is gpu'),
    ({'dtype': 'float64'}, TPU, 'dtype=bfloat16 or float32, not float64'),
    ({'attention_function': 'relu2'}, TPU, 'attention_function=softmax, not relu2'),
    ({'relative_bias': 'toeplitz'}, TPU, 'relative_bias=none, not toeplitz'),
    ({'num_heads': 4}, TPU, 'heads of a width that is a multiple of 8, 64 to 256, not 32'),
    ({'head_dim': 100}, TPU, 'heads of a width that is a multiple of 8, 64 to 256, not 100'),
    ({'head_dim': 264}, TPU, 'heads of a width that is a multiple of 8, 64 to 256, not 264'),
], ids=str)  # fmt: skip
def test_where_splash_cannot_be_it_says_why_and_auto_takes_another(fields, target, reason):
    config = tiny_config('transformer_plus_plus', **{'dtype': 'bfloat16', 'model_dim': 128, 'num_heads': 2} | fields)
    assert settle(config, target=target).attention in ('cudnn', 'xla')
    config.impl = 'splash'
    with pytest.raises(UserError) as error:
        settle(config, target=target)
    assert str(error.value) == f'model.impl=splash needs {reason}'


@pytest.mark.parametrize('ids', [None, 'packed'])
def test_the_layer_calls_splash_as_it_calls_the_others(monkeypatch, ids):
    monkeypatch.setenv('GAU_PALLAS_INTERPRET', '1')
    fields = {'model_dim': 128, 'num_layers': 1, 'temperature': 'learned', 'dtype': 'float32'}
    model, params = make('transformer_plus_plus', **fields)
    fused = model.clone(implementation=Implementation('splash'))
    ids = None if ids is None else jnp.asarray([LAYOUTS[ids]], 'int32')
    with jax.enable_x64(False):
        text = tokens().astype('int32')
        assert max_error(apply(fused, params, text, ids), apply(model, params, text, ids)) < 1e-5


@pytest.mark.parametrize(('fields', 'target', 'reason'), [
    ({}, CPU, 'a GPU, this is cpu'),
    ({}, TPU, 'a GPU, this is tpu'),
    ({}, Target('gpu'), 'an NVIDIA GPU of compute capability 8.0 or newer'),
    ({}, Target('gpu', (7, 5)), 'an NVIDIA GPU of compute capability 8.0 or newer'),
    ({'dtype': 'float32'}, HOPPER, 'dtype=bfloat16, not float32'),
    ({'attention_function': 'relu2'}, HOPPER, 'attention_function=softmax, not relu2'),
    ({'relative_bias': 'toeplitz'}, HOPPER, 'relative_bias=none, not toeplitz'),
    ({'num_heads': 8}, HOPPER, 'heads of a width that is a multiple of 8 and at most 232, not 4'),
    ({'head_dim': 128}, Target('gpu', (8, 6)), 'heads of a width that is a multiple of 8 and at most 104, not 128'),
    ({'head_dim': 240}, HOPPER, 'heads of a width that is a multiple of 8 and at most 232, not 240'),
    ({}, HOPPER._replace(sequence_shards=4), 'whole sequences on each device, not mesh.sequence=4'),
], ids=str)  # fmt: skip
def test_where_cudnn_cannot_be_it_says_why_and_auto_takes_another(fields, target, reason):
    config = tiny_config('transformer_plus_plus', **FUSED | fields)
    assert settle(config, target=target).attention == 'xla'
    config.impl = 'cudnn'
    with pytest.raises(UserError) as error:
        settle(config, target=target)
    assert str(error.value) == f'model.impl=cudnn needs {reason}'


def test_triton_for_flash_quad_has_relu2_and_the_softmaxes():
    for function in ('relu2', 'softmax', 'softmax_plus'):
        config = tiny_config('flash_quad', dtype='bfloat16', attention_function=function)
        assert settle(config, target=HOPPER).attention == 'triton'
    config.attention_function = 'laplace'
    assert settle(config, target=HOPPER).attention == 'xla'
    config.impl = 'triton'
    reason = 'attention_function=relu2 or softmax or softmax_plus, this is laplace'
    with pytest.raises(UserError, match=f'^model.impl=triton needs {reason}$'):
        settle(config, target=HOPPER)


@pytest.mark.parametrize('name', ['flash', 'flash_quad'])
def test_triton_is_the_choice_on_a_gpu_and_its_interpreter_nobodys(name):
    config, fused = tiny_config(name, dtype='bfloat16'), tiny_config(name, dtype='float32', impl='triton')
    assert settle(tiny_config(name, dtype='float32'), target=HOPPER).attention == 'xla'
    assert settle(fused, target=HOPPER).attention == 'triton'
    assert settle(config, target=HOPPER).attention == 'triton'
    if name == 'flash':
        assert settle(tiny_config(name, dtype='bfloat16', local_window=2), target=HOPPER).attention == 'triton'
    assert settle(config, target=CPU).attention == 'xla'
    with pytest.raises(UserError, match=r'^model.impl=triton needs an NVIDIA GPU, this is cpu$'):
        settle(fused, target=CPU)
    with pytest.raises(
        UserError, match=r'^model.impl=triton needs jax-triton \(pip install -r requirements-gpu.txt\)$'
    ):
        settle(fused, target=HOPPER._replace(triton=False))
    assert settle(config, target=HOPPER._replace(interpreted=True)).attention == 'xla'
    assert settle(config, target=INTERPRETER).attention == 'xla'
    assert settle(fused, target=INTERPRETER).attention == 'triton'
    with pytest.raises(UserError, match=r'^model.impl=triton needs triton \(pip install -r requirements-test.txt\)$'):
        settle(fused, target=INTERPRETER._replace(triton=False))
    with pytest.raises(UserError, match=r'^model.impl=triton needs an NVIDIA GPU, this is tpu$'):
        settle(fused, target=TPU._replace(interpreted=True))


ON_TPU = {'dtype': 'bfloat16', 'model_dim': 64}


@pytest.mark.parametrize(('objective', 'name', 'fields'), [
    *[('lm', 'flash', fields) for fields in ({}, {'attention_function': 'softmax'}, {'decay_gate': 'scalar'})],
    ('lm', 'flash', {'key_input': 'shifted', 'local_window': 2}),
    *[('mlm', 'flash', fields) for fields in ({}, {'attention_function': 'softmax'})],
    *[(objective, 'flash_quad', fields) for objective in ('lm', 'mlm') for fields in ({}, {'gate': 'none'})],
], ids=str)  # fmt: skip
def test_pallas_is_the_choice_of_gated_units_on_a_tpu_and_nowhere_else(objective, name, fields):
    config = tiny_config(name, objective, **ON_TPU | fields)
    for target in (TPU, TPU._replace(triton=True), TPU._replace(sequence_shards=2)):
        assert settle(config, target=target) == Implementation('pallas')
    interpreter = CPU._replace(pallas_interpreted=True)
    for target in (CPU, HOPPER, interpreter):
        assert settle(config, target=target).attention != 'pallas'
    config.dtype = 'float32'
    assert settle(config, target=TPU).attention == 'xla'
    config.impl = 'pallas'
    for target in (TPU, interpreter):
        assert settle(config, target=target) == Implementation('pallas')


@pytest.mark.parametrize(('fields', 'target', 'reason'), [
    ({}, CPU, 'a TPU, this is cpu'),
    ({}, HOPPER, 'a TPU, this is gpu'),
    ({'dtype': 'float64'}, TPU, 'dtype=bfloat16 or float32, this is float64'),
    ({'num_heads': 2}, TPU, 'num_heads=1, this is 2'),
    ({'branches': 'local'}, TPU, 'branches=both, this is local'),
    ({'gate': 'none'}, TPU, 'gate=silu, this is none'),
    ({'far_chunks': 2}, TPU, 'far_chunks=0, this is 2'),
    ({'chunk_size': 600}, TPU, 'chunk_size * local_window up to 512, this is 600'),
    ({'chunk_size': 272, 'local_window': 2}, TPU, 'chunk_size * local_window up to 512, this is 544'),
    ({'query_key_dim': 258}, TPU, 'query_key_dim up to 256, this is 258'),
    ({'model_dim': 72}, TPU, 'E = expansion_factor * model_dim a multiple of 128, this is 144'),
], ids=str)  # fmt: skip
def test_where_pallas_cannot_be_it_says_why_and_auto_takes_another(fields, target, reason):
    config = tiny_config('flash', context=1200, **ON_TPU | fields)
    assert settle(config, target=target).attention in ('triton', 'xla')
    config.impl = 'pallas'
    with pytest.raises(UserError) as error:
        settle(config, target=target)
    assert str(error.value) == f'model.impl=pallas needs {reason}'


def test_pallas_for_flash_quad_needs_relu2_and_a_width_that_fits():
    for fields, reason in (
        ({'attention_function': 'softmax'}, 'attention_function=relu2, this is softmax'),
        ({'model_dim': 2048}, 'E = expansion_factor * model_dim up to 3072, this is 4096'),
    ):
        config = tiny_config('flash_quad', **ON_TPU | fields)
        assert settle(config, target=TPU).attention == 'xla'
        config.impl = 'pallas'
        with pytest.raises(UserError, match=f'^model.impl=pallas needs {re.escape(reason)}$'):
            settle(config, target=TPU)


@pytest.mark.parametrize(('name', 'objective', 'fields'), [
    ('flash', 'lm', {'decay_gate': 'scalar', 'key_input': 'shifted', 'local_window': 2}),
    pytest.param('flash', 'mlm', {}, marks=pytest.mark.slow),
    pytest.param('flash_quad', 'lm', {}, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_model_with_pallas_has_the_parameters_and_the_gradients_of_one_without(monkeypatch, name, objective, fields):
    monkeypatch.setenv('GAU_PALLAS_INTERPRET', '1')
    model, params = make(name, objective, num_layers=1, temperature='learned', dtype='float32', **fields)
    fused = model.clone(implementation=Implementation('pallas'))
    with jax.enable_x64(False):
        text, ids = tokens().astype('int32'), jnp.asarray([LAYOUTS['packed']], 'int32')
        shapes = [jax.eval_shape(m.init, jax.random.key(0), text)['params'] for m in (fused, model)]
        assert shapes[0] == shapes[1]

        def gradient(model):
            logits = lambda params: (model.apply({'params': params}, text, segment_ids_BN=ids) ** 2).sum()  # noqa: E731
            return jax.jit(jax.grad(logits))(params)

        assert max_error(gradient(fused), gradient(model)) < 1e-4


def test_norm_and_loss_follow_the_attention():
    fused = {'dtype': 'bfloat16'}
    whole = settle(tiny_config('flash', **fused), target=HOPPER)
    assert whole[:3] == ('triton', 'triton', 'triton')
    for fields in ({'norm': 'layer_norm'}, {'norm_placement': 'post'}, {'norm_placement': 'sandwich'}):
        assert settle(tiny_config('flash', **fused, **fields), target=HOPPER)[:3] == ('triton', 'xla', 'triton')
    # Without a gate only the attention has kernels.
    assert settle(tiny_config('flash_quad', **fused, gate='none'), target=HOPPER)[:3] == ('triton', 'xla', 'triton')
    softmax = tiny_config('transformer', **fused, model_dim=32)
    assert settle(softmax, target=HOPPER) == Implementation('cudnn', loss='triton')
    assert settle(softmax, target=HOPPER._replace(triton=False)) == Implementation('cudnn')
    assert slice_loss('triton', 65_536) is FUSED_LOSS
    assert slice_loss('triton', 65_537) is slice_loss('xla', 11) is REFERENCE


def test_norms_are_computed_again_where_a_tpu_scans_its_layers():
    for name in ('flash', 'transformer_plus_plus'):
        scanned = tiny_config(name, layer_stack='scan', dtype='bfloat16')
        assert settle(scanned, target=TPU).norm == 'recomputed'
        assert settle(tiny_config(name, dtype='bfloat16'), target=TPU).norm == settle(scanned, target=CPU).norm == 'xla'
        assert settle(scanned, target=HOPPER).norm != 'recomputed'


@pytest.mark.parametrize('ids', [None, 'packed'])
def test_the_layer_calls_cudnn_as_it_calls_the_others(monkeypatch, ids):
    """With XLA's attention in cuDNN's place, for there is no GPU here."""
    stand_in = functools.partial(quadratic.cudnn_attention, implementation='xla')
    monkeypatch.setattr(quadratic, 'cudnn_attention', stand_in)
    model, params = make('transformer_plus_plus', model_dim=32, temperature='learned')
    fused = model.clone(implementation=Implementation('cudnn'))
    ids = None if ids is None else jnp.asarray([LAYOUTS[ids]])
    # jax.nn.dot_product_attention has its scores in float32.
    assert max_error(apply(fused, params, tokens(), ids), apply(model, params, tokens(), ids)) < 1e-5


def test_compiler_options_are_some_that_xla_knows():
    options = settle(tiny_config('flash', dtype='bfloat16'), target=HOPPER).compiler_options
    assert options
    assert jax.jit(lambda x: x + 1, compiler_options=dict(options))(1) == 2
    assert not settle(tiny_config('flash'), target=CPU).compiler_options
