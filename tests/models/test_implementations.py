import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from ml_collections import FrozenConfigDict

from gau.errors import UserError
from gau.layers import attention
from gau.models import implementations
from gau.models.architectures import ARCHITECTURES
from gau.models.config import ENUMS
from gau.models.implementations import Target, select_implementation
from gau.models.registry import build
from tests.models.tiny import CAUSAL, apply, make, tiny_config, tokens
from tests.numerics import LAYOUTS, max_error

CPU, TPU, HOPPER = Target('cpu'), Target('tpu'), Target('gpu', (9, 0))


@pytest.mark.parametrize('name', CAUSAL)
def test_auto_on_a_cpu_is_xla_where_there_is_one(name):
    config = tiny_config(name)
    assert config.impl == 'auto'
    expected = 'reference' if name == 'combiner' else 'xla'
    assert select_implementation(config, target=CPU) == expected
    model = build(config, vocab_size=3, causal=True)
    assert model.config.impl == expected
    assert config.impl == 'auto', 'the config itself says what was asked for'


def test_what_was_chosen_is_taken():
    assert select_implementation(tiny_config('flash', impl='reference'), target=CPU) == 'reference'


def test_auto_takes_the_first_that_works_and_a_choice_that_does_not_is_refused(monkeypatch):
    def fast(config, target):
        return None if target.compute_capability == (9, 0) else f'a Hopper GPU, this is {target.platform}'

    monkeypatch.setitem(implementations.WHY_NOT, 'fast', fast)
    architecture = ARCHITECTURES['flash']
    table = dict(ARCHITECTURES) | {'flash': architecture._replace(impls=('fast', *architecture.impls))}
    monkeypatch.setattr(implementations, 'ARCHITECTURES', table)
    config = tiny_config('flash')
    assert select_implementation(config, target=HOPPER) == 'fast'
    assert select_implementation(config, target=TPU) == 'xla'
    config.impl = 'fast'
    with pytest.raises(UserError, match=r'^model.impl=fast needs a Hopper GPU, this is tpu$'):
        select_implementation(config, target=TPU)


def test_every_implementation_has_an_entry_and_works_somewhere():
    named = {impl for architecture in ARCHITECTURES.values() for impl in architecture.impls}
    assert named == set(implementations.WHY_NOT) == set(ENUMS['impl']) - {'auto'}


@pytest.mark.parametrize(('attributes', 'expected'), [
    ({'platform': 'gpu', 'compute_capability': '9.0'}, Target('gpu', (9, 0), 2)),
    ({'platform': 'gpu', 'compute_capability': '12.1'}, Target('gpu', (12, 1), 2)),
    ({'platform': 'gpu', 'compute_capability': 'gfx942'}, Target('gpu', None, 2)),
    ({'platform': 'tpu'}, Target('tpu', None, 2)),
], ids=str)  # fmt: skip
def test_target_of_a_device(attributes, expected):
    assert Target.of_device(SimpleNamespace(**attributes), sequence_shards=2) == expected


def test_the_default_target_is_the_device_at_hand():
    assert Target.of_device(jax.devices()[0]) == CPU


FUSED = {'dtype': 'bfloat16', 'model_dim': 32}


@pytest.mark.parametrize('name', ['transformer', 'transformer_plus', 'transformer_plus_plus'])
def test_softmax_attention_on_a_gpu_is_cudnn(name):
    for fields in ({}, {'temperature': 'learned'}, {'num_heads': 4}):
        assert select_implementation(tiny_config(name, **FUSED, **fields), target=HOPPER) == 'cudnn'
    assert select_implementation(tiny_config(name, **FUSED), target=TPU) == 'xla'


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
    assert select_implementation(config, target=target) == 'xla'
    config.impl = 'cudnn'
    with pytest.raises(UserError) as error:
        select_implementation(config, target=target)
    assert str(error.value) == f'model.impl=cudnn needs {reason}'


@pytest.mark.parametrize('name', ['flash', 'flash_quad'])
def test_triton_is_the_choice_on_a_gpu_and_its_interpreter_nobodys(monkeypatch, name):
    monkeypatch.setattr(implementations, 'available', lambda: True)
    config, fused = tiny_config(name, dtype='bfloat16'), tiny_config(name, dtype='float32', impl='triton')
    monkeypatch.setenv('TRITON_INTERPRET', '0')
    assert select_implementation(tiny_config(name, dtype='float32'), target=HOPPER) == 'xla'
    assert select_implementation(fused, target=HOPPER) == 'triton'
    assert select_implementation(config, target=HOPPER) == 'triton'
    assert select_implementation(config, target=CPU) == 'xla'
    with pytest.raises(UserError, match=r'^model.impl=triton needs an NVIDIA GPU, this is cpu$'):
        select_implementation(fused, target=CPU)
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    assert select_implementation(config, target=HOPPER) == 'xla'
    assert select_implementation(config, target=CPU) == 'xla'
    assert select_implementation(fused, target=CPU) == 'triton'
    with pytest.raises(UserError, match=r'^model.impl=triton needs an NVIDIA GPU, this is tpu$'):
        select_implementation(fused, target=TPU)


@pytest.mark.parametrize('ids', [None, 'packed'])
def test_the_layer_calls_cudnn_as_it_calls_the_others(monkeypatch, ids):
    """With XLA's attention in cuDNN's place, for there is no GPU here."""
    stand_in = functools.partial(attention.cudnn_attention, implementation='xla')
    monkeypatch.setattr(attention, 'cudnn_attention', stand_in)
    model, params = make('transformer_plus_plus', model_dim=32, temperature='learned')
    fused = model.clone(config=FrozenConfigDict(dict(model.config) | {'impl': 'cudnn'}))
    ids = None if ids is None else jnp.asarray([LAYOUTS[ids]])
    # jax.nn.dot_product_attention has its scores in float32.
    assert max_error(apply(fused, params, tokens(), ids), apply(model, params, tokens(), ids)) < 1e-5


def test_compiler_options_are_some_that_xla_knows():
    assert jax.jit(lambda x: x + 1, compiler_options=implementations.compiler_options('triton'))(1) == 2
    assert [impl for impl in implementations.WHY_NOT if implementations.compiler_options(impl)] == ['triton']
