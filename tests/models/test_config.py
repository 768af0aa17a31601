import re
import subprocess
import sys

import pytest
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES, SIZES
from gau.models.config import declared_fields, default_config, resolve
from gau.models.fields import GONE, GONE_VALUES
from tests.conftest import ROOT
from tests.models.tiny import CASES


def config_of(name='flash', **fields):
    config = default_config()
    config.name = name
    config.update(fields)
    return config


def resolved(name='flash', objective='lm', context=1024, **fields):
    return resolve(config_of(name, **fields), causal=objective == 'lm', context=context)


@pytest.mark.parametrize('size', sorted(SIZES))
@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_resolving_fills_what_applies_and_is_idempotent(name, objective, size):
    config = config_of(name, size=size)
    before = config.to_dict()
    once = resolve(config, causal=objective == 'lm', context=700)
    assert config.to_dict() == before
    assert resolve(once, causal=objective == 'lm', context=700) == once
    # At other contexts a resolved config keeps its shapes (evaluation does that).
    assert resolve(once, causal=objective == 'lm', context=64) == once
    for field in default_config():
        assert field in ('name', 'size') or once[field] is None or field in ARCHITECTURES[name].fields


def test_every_field_is_documented_and_belongs_to_a_model():
    assert set(default_config()) == {'name', 'size', *declared_fields()}
    for field in declared_fields().values():
        assert field.doc.endswith('.')
        assert field.default is None or isinstance(field.default, field.kind)
        assert not field.choices or field.default in (None, *field.choices)


def test_defaults_are_the_papers():
    flash = resolved('flash', size='base')
    assert (flash.model_dim, flash.num_layers, flash.expansion_factor) == (768, 24, 2)
    assert (flash.query_key_dim, flash.chunk_size, flash.num_heads) == (128, 256, 1)
    assert (flash.attention_function, flash.normalizer, flash.norm, flash.gamma_init) == (
        'relu2', 'paper', 'scale_norm', 'normal'
    )  # fmt: skip
    assert (flash.relative_bias, flash.rope, flash.absolute_position) == ('toeplitz', 'rotary', 'sinusoid')
    transformer = resolved('transformer_plus_plus', size='base')
    assert (transformer.num_layers, transformer.num_heads, transformer.head_dim) == (12, 12, 64)
    assert (transformer.feed_forward, transformer.feed_forward_dim) == ('geglu', 2048)


@pytest.mark.parametrize(('fields', 'expected'), [
    ({'name': 'flash_quad', 'objective': 'lm'}, {'normalizer': 'fixed', 'normalizer_length': 512}),
    ({'name': 'flash_quad', 'objective': 'mlm'}, {'normalizer': 'paper', 'normalizer_length': None}),
    ({'name': 'flash_quad', 'context': 512}, {'relative_bias': 'toeplitz', 'relative_bias_length': 512}),
    ({'name': 'flash_quad', 'context': 513}, {'relative_bias': 'rotary', 'relative_bias_length': 513}),
    ({'relative_bias': 'rotary', 'relative_bias_init': 'normal'}, {'relative_bias_length': None}),
    ({'chunk_size': 1024}, {'relative_bias': 'rotary'}),
    ({'relative_bias': 'none'}, {'gamma_init': 'ones'}),
    ({'branches': 'global'}, {'gamma_init': 'ones', 'relative_bias': None, 'attention_function': None}),
    ({'branches': 'local'}, {'global_reduction': None}),
    ({'attention_function': 'softmax'}, {'normalizer': None}),
    ({'name': 'combiner', 'context': 1024}, {'chunk_size': 32}),
    ({'name': 'performer'}, {'num_features': None}),
    ({'name': 'performer', 'feature_map': 'favor'}, {'num_features': 256}),
    ({'name': 'linformer', 'objective': 'mlm', 'context': 100}, {'projection_rank': 100, 'projection_length': 100}),
    ({'name': 'transformer_plus_plus', 'feed_forward': 'gelu'}, {'feed_forward_dim': 4 * 768}),
], ids=str)  # fmt: skip
def test_what_follows_from_what(fields, expected):
    config = resolved(**fields)
    assert {field: config[field] for field in expected} == expected


@pytest.mark.parametrize(('fields', 'message'), [
    ({'name': 'flsh'}, 'model.name=flsh does not exist; did you mean "flash"?'),
    ({'size': 'bse'}, 'model.size=bse does not exist; did you mean "base"?'),
    ({'attention_function': 'relu'}, 'model.attention_function=relu does not exist; did you mean "relu2"?'),
    ({'impl': 'handmade'}, 'model.impl=handmade does not exist; choose from'),
    ({'query_key_dim': 65}, 'model.query_key_dim=65 is odd; RoPE rotates pairs'),
    ({'query_key_dim': 65, 'rope': 'none', 'chunk_size': 1024}, 'odd; relative_bias=rotary rotates pairs'),
    ({'name': 'transformer_plus_plus', 'head_dim': 7}, 'model.head_dim=7 is odd; RoPE rotates pairs'),
    ({'name': 'transformer_plus_plus', 'num_heads': 7}, 'model.num_heads=7 does not divide model.model_dim=768'),
    ({'name': 'linformer'}, 'model.name=linformer cannot be a causal language model: it mixes the whole sequence'),
    ({'num_heads': 5}, 'model.num_heads=5, which does not divide E = expansion_factor * model_dim = 1536'),
    ({'expansion_factor': 1.3}, 'times model_dim=768 is 998.4; it must be a whole number'),
    ({'model_dim': 7, 'expansion_factor': 1.0}, 'model.absolute_position=sinusoid needs an even model_dim, not 7'),
    ({'name': 'flash_quad', 'chunk_size': 64}, 'chunk_size=64 does not apply to flash_quad: it is a field of flash'),
    ({'name': 'transformer', 'branches': 'local'}, 'model.branches=local does not apply to transformer'),
    ({'branches': 'global', 'relative_bias': 'none'}, 'branches=global has no local branch'),
    ({'branches': 'local', 'global_reduction': 'sum'}, 'branches=local has no global branch'),
    ({'attention_function': 'softmax', 'normalizer': 'su'}, 'softmax normalises by itself'),
    ({'normalizer': 'su', 'normalizer_length': 9}, 'it is the constant of normalizer=fixed, and this is su'),
    ({'relative_bias': 'none', 'relative_bias_length': 9}, 'it is the length of a toeplitz table'),
    ({'name': 'flash_quad', 'relative_bias': 'none', 'gamma_init': 'normal'}, 'leaves the layer dead; use'),
    ({'name': 'performer', 'num_features': 9}, 'it is the number of random features of feature_map=favor'),
    ({'name': 'combiner', 'impl': 'xla'}, 'model.impl=xla does not exist for combiner; choose from auto, reference'),
    ({'chunk_size': 0}, 'model.chunk_size must be at least 1, not 0'),
    ({'chunk_size': 2**31}, 'model.chunk_size=2147483648 is too large: want at most 2147483647'),
    ({'num_layers': 10**12}, 'model.num_layers=1000000000000 is too large: want at most 10000'),
    ({'dropout_rate': 1.0}, 'model.dropout_rate must be in [0, 1), not 1.0'),
    ({'relative_bias_scale': -1.0}, 'model.relative_bias_scale must be'),
    ({'expansion_factor': float('inf')}, 'model.expansion_factor=inf is too large: want at most 1000'),
    ({'expansion_factor': 1e8}, 'model.expansion_factor=100000000.0 is too large'),
    ({'relative_bias_scale': float('inf')}, 'model.relative_bias_scale=inf is too large'),
    ({'expansion_factor': 0.0}, 'model.expansion_factor must be positive'),
    (
        {'name': 'flash_quad', 'relative_bias_length': 512, 'relative_bias': 'toeplitz'},
        'model.relative_bias_length=512 is too short for a context of 1024',
    ),
    (
        {'name': 'linformer', 'objective': 'mlm', 'projection_length': 100},
        'model.projection_length=100 is too short for a context of 1024',
    ),
    (
        {'branches': 'global', 'context': 256},
        'model.chunk_size=256 makes one chunk of a context of 256: branches=global would see nothing',
    ),
    (
        {'name': 'mc_transformer_plus_plus', 'branches': 'global', 'chunk_size': 2048},
        'branches=global would see nothing',
    ),
    ({'global_reduction': 'sum', 'chunk_size': 1024}, 'global_reduction=sum changes nothing'),
    ({'decay_gate': 'scalar', 'chunk_size': 1024}, 'decay_gate=scalar changes nothing'),
    ({'decay_gate': 'scalar', 'branches': 'local'}, 'branches=local has no global branch'),
    ({'name': 'flash_quad', 'rope': 'local'}, 'model.rope=local is of attention inside chunks and between them'),
    ({'branches': 'global', 'rope': 'local'}, 'model.rope=local is of attention inside chunks and between them'),
    ({'decay_gate': 'scalar', 'objective': 'mlm'}, 'model.decay_gate=scalar is of causal models with one head'),
    ({'local_window': 2, 'num_heads': 2}, 'model.local_window=2 is of causal models with one head'),
    ({'local_window': 3}, 'model.local_window must be 1 or 2, not 3'),
    ({'far_chunks': -1}, 'model.far_chunks must be at least 0, not -1'),
    ({'far_chunks': 2, 'objective': 'mlm'}, 'model.far_chunks=2 is of causal models with one head'),
    ({'far_chunks': 2, 'chunk_size': 1024}, 'far_chunks=2 changes nothing'),
    ({'short_convolution': -1}, 'model.short_convolution must be at least 0, not -1'),
    ({'short_convolution': 3, 'objective': 'mlm'}, 'model.short_convolution=3 must be even where'),
    ({'context': 0}, 'context must be at least 1, not 0'),
], ids=str)  # fmt: skip
def test_wrong_combinations_are_refused_in_one_line(fields, message):
    with pytest.raises(UserError) as error:
        resolved(**fields)
    assert message in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(('given', 'against'), [
    ({'branches': 'local'}, ['decay_gate']),
    ({'num_heads': 4}, ['decay_gate', 'local_window']),
    ({'name': 'transformer'}, ['chunk_size', 'decay_gate', 'key_input', 'local_window']),
    ({'local_window': 3}, []),
    ({'branches': 'local', 'decay_gate': 'scalar'}, []),
], ids=str)  # fmt: skip
def test_a_refusal_names_what_the_config_program_sets_against_a_command_line(given, against):
    program = {'key_input': 'shifted', 'chunk_size': 128, 'local_window': 2, 'decay_gate': 'scalar'}
    with pytest.raises(UserError) as error:
        resolve(config_of(**program | given), causal=True, context=1024, given=[f'model.{name}' for name in given])
    assert re.findall(r'--config.model.(\w+)=None', str(error.value)) == against
    if against:
        resolved(**{name: value for name, value in (program | given).items() if name not in against})


@pytest.mark.parametrize(('objective', 'context', 'fields'), [
    ('lm', 257, {'branches': 'global'}),
    ('lm', 257, {'global_reduction': 'sum'}),
    ('lm', 256, {}),
    ('lm', 256, {'branches': 'local'}),
    ('mlm', 256, {'branches': 'global', 'global_reduction': 'sum'}),
], ids=str)  # fmt: skip
def test_a_single_chunk_is_refused_only_where_nothing_is_seen(objective, context, fields):
    once = resolved(objective=objective, context=context, **fields)
    assert resolve(once, causal=objective == 'lm', context=context) == once
    # Evaluation at a short context refuses no reduction the model was trained with.
    if fields.get('branches') != 'global':
        assert resolve(once, causal=objective == 'lm', context=64) == once


def test_an_unknown_field_is_refused():
    config = ConfigDict(default_config().to_dict() | {'chunk_sze': 3})
    with pytest.raises(UserError, match=r'model.chunk_sze does not exist; did you mean "chunk_size"'):
        resolve(config, causal=True, context=8)


def test_configs_and_counts_import_no_jax():
    code = 'import sys, gau.models.config, gau.models.counts; sys.exit("jax" in sys.modules or "flax" in sys.modules)'
    assert subprocess.run([sys.executable, '-c', code], check=False).returncode == 0


def test_a_config_that_was_resolved_before_a_field_came_is_understood():
    # One chunk, in which a reduction that somebody chose would be refused.
    config = resolved(context=128)
    older = config.copy_and_resolve_references()
    came = 'decay_gate', 'local_window', 'short_convolution', 'key_input', 'far_chunks'
    for field in came:
        del older[field]
    assert resolve(older, causal=True, context=128) == config


@pytest.mark.parametrize('field', GONE)
def test_a_field_that_is_gone_names_the_page_that_has_its_commit(field):
    page = GONE[field].page
    text = (ROOT / 'docs' / 'results' / f'{page}.md').read_text()
    assert f'`model.{field}`' in text
    assert re.search(r'commit [0-9a-f]{7} still has them', text)
    config = default_config()
    with config.unlocked():
        config[field] = 1.0
    with pytest.raises(UserError, match=rf'model.{field} does not exist; it is gone, docs/results/{page}.md names'):
        resolve(config, causal=True, context=8)


@pytest.mark.parametrize(('field', 'value'), GONE_VALUES)
def test_a_value_that_is_gone_names_the_page_that_has_its_commit(field, value):
    page = GONE_VALUES[field, value]
    text = (ROOT / 'docs' / 'results' / f'{page}.md').read_text()
    assert f'`model.{field}={value}`' in text
    assert re.search(r'commit [0-9a-f]{7} still has them', text)
    with pytest.raises(UserError, match=f'^model.{field}={value} does not exist; it is gone, docs/results/{page}.md '):
        resolved(**{field: value})
