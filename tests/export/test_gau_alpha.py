"""GAU-alpha's layout: our model computes what the package `gau-alpha` does, with random weights."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.export import gau_alpha
from gau.models import registry
from gau.models.config import default_config, resolve
from gau.models.weights import restored
from tests.numerics import float64, max_error

SIZES = {
    'vocab_size': 97,
    'hidden_size': 32,
    'intermediate_size': 48,
    'num_hidden_layers': 3,
    'attention_key_size': 16,
    'max_position_embeddings': 40,
    'type_vocab_size': 2,
}
CONFIG = {'model_type': 'gau_alpha', 'hidden_size': 32, **gau_alpha.DEFAULTS, **SIZES}


def weights_of(rng, *, bias=False):
    d, e, s = 32, 48, 16
    shapes = {'embeddings.word_embeddings.weight': (97, d), 'embeddings.token_type_embeddings.weight': (2, d)}
    for layer in range(3):
        name = f'encoder.layer.{layer}.gau'
        shapes |= {f'{name}.i_dense.weight': (2 * e + s, d), f'{name}.o_dense.weight': (d, e)}
        shapes |= {f'{name}.{role}_scaleoffset.weight': (s,) for role in 'qk'}
        if bias:
            shapes |= {f'{name}.i_dense.bias': (2 * e + s,), f'{name}.o_dense.bias': (d,)}
            shapes |= {f'{name}.{role}_scaleoffset.bias': (s,) for role in 'qk'}
    return {name: rng.normal(size=shape, scale=0.3).astype(np.float32) for name, shape in shapes.items()}


def ours(weights, config, tokens_BN, real_BN):
    """Hidden states and logits of our model with these weights, float64."""
    fields = default_config()
    fields.update(gau_alpha.model_of(config, where='x') | {'dtype': 'float64'})
    model = registry.build(resolve(fields, causal=False, context=40), vocab_size=97, causal=False)
    named = {name: x.astype(np.float64) for name, x in gau_alpha.parameters(weights, config, where='x').items()}
    wanted = model.init(jax.random.key(0), jnp.zeros((1, 8), int))['params']
    params = restored(named, nn.unbox(wanted), where='x')
    h_BND = model.apply({'params': params}, tokens_BN, segment_ids_BN=real_BN.astype(int), method='hidden')
    return h_BND, model.apply({'params': params}, h_BND, method='logits')


@pytest.mark.slow
@pytest.mark.parametrize(
    ('normalization', 'bias', 'tied'),
    [
        ('softmax_plus', False, True),
        ('softmax_plus', False, False),
        ('softmax', True, True),
        ('squared_relu', False, True),
    ],
)
def test_hidden_states_and_logits_are_those_of_the_package(normalization, bias, tied, monkeypatch):
    torch = pytest.importorskip('torch', reason='GAU-alpha is a PyTorch package')
    modeling_utils = pytest.importorskip('transformers.modeling_utils', reason='GAU-alpha needs transformers')
    # transformers 5 has it no more; only heads that are not asked here read it.
    monkeypatch.setattr(modeling_utils, 'SequenceSummary', torch.nn.Identity, raising=False)
    oracle = pytest.importorskip('gau_alpha', reason='pip install gau-alpha')
    rng = np.random.default_rng(0)
    # Our norms have this epsilon; theirs is 1e-12 by default.
    config = CONFIG | {'normalization': normalization, 'use_bias': bias, 'layer_norm_eps': 1e-5}
    weights = weights_of(rng, bias=bias)
    fields = {name: value for name, value in config.items() if name != 'model_type'}
    theirs = oracle.GAUAlphaForMaskedLM(oracle.GAUAlphaConfig(**fields, tie_word_embeddings=tied)).double().eval()
    decoder = {'cls.predictions.decoder.weight': rng.normal(size=(97, 32)).astype(np.float32)}
    given = {f'gau_alpha.{name}': x for name, x in weights.items()}
    # The package has one matrix there by default, and its files leave the second name out.
    as_loaded = given | ({name: weights['embeddings.word_embeddings.weight'] for name in decoder} if tied else decoder)
    given |= {} if tied else decoder
    theirs.load_state_dict({name: torch.tensor(x).double() for name, x in as_loaded.items()}, strict=True)
    tokens_BN = rng.integers(1, 97, (2, 33))
    real_BN = np.arange(33) < np.array([[33], [20]])
    with torch.no_grad():
        asked = {'input_ids': torch.tensor(tokens_BN), 'attention_mask': torch.tensor(real_BN)}
        expected = theirs.gau_alpha(**asked).last_hidden_state.numpy(), theirs(**asked).logits.numpy()
    with float64():
        found = ours(given, config, tokens_BN, real_BN)
    # The embedding is normalised in float64 and kept in float32.
    for x, y in zip(found, expected, strict=True):
        assert max_error(np.asarray(x)[real_BN], y[real_BN]) < 1e-5


def test_a_run_starts_from_the_imported_model(tmp_path):
    from safetensors.numpy import save_file

    from configs import finetune
    from gau.training.config import resolve as resolve_config
    from gau.training.init_from import with_pretrained
    from gau.training.setup import Run

    source = tmp_path / 'theirs'
    source.mkdir()
    weights = weights_of(np.random.default_rng(0))
    # Bytes and four specials.
    weights['embeddings.word_embeddings.weight'] = np.ones((260, 32), np.float32)
    prefixed = {f'gau_alpha.{name}': x for name, x in weights.items()}
    save_file(
        prefixed | {'cls.predictions.decoder.weight': np.ones((260, 32), np.float32)}, source / 'model.safetensors'
    )
    (source / 'config.json').write_text(json.dumps(CONFIG | {'vocab_size': 260}))
    gau_alpha.convert(source, tmp_path / 'ours', tokenizer='bytes')
    config = finetune.get_config(f'start={tmp_path}/ours,data=embedded,context=40,runlocal')
    assert (config.objective, config.model.attention_function) == ('classification', 'softmax_plus')
    run = Run.from_config(resolve_config(config))
    params, drawn = with_pretrained(run.init_params(), run.abstract_params, tmp_path / 'ours', tokenizer=run.tokenizer)
    assert drawn == ['head']
    weight = prefixed['gau_alpha.encoder.layer.2.gau.o_dense.weight']
    np.testing.assert_array_equal(params['trunk']['blocks_2']['gau']['out']['kernel'], weight.T)
    with pytest.raises(UserError, match='exists already'):
        gau_alpha.convert(source, tmp_path / 'ours', tokenizer='bytes')


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'model_type': 'bert'}, 'model_type=bert has no counterpart'),
        ({'hidden_act': 'relu'}, 'hidden_act=relu has no counterpart here, only swish has'),
        ({'normalization': 'sparsemax'}, 'normalization=sparsemax has no counterpart'),
        ({'embedding_size': 16}, 'embedding_size=16 beside hidden_size=32'),
        ({'attention_key_size': 8}, r'i_dense.weight is \[112, 32\] there, and \[104, 32\] by its config'),
        ({'num_hidden_layers': 4}, 'encoder.layer.3.gau.i_dense.weight is absent there'),
        ({'hidden_size': None}, 'is no directory of a GAU-alpha model'),
        ({}, 'has 260 tokens and the embedding 97'),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(tmp_path, change, message):
    from safetensors.numpy import save_file

    save_file(weights_of(np.random.default_rng(0)), tmp_path / 'model.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG | change))
    with pytest.raises(UserError, match=message):
        gau_alpha.convert(tmp_path, tmp_path / 'out', tokenizer='bytes')
    assert not (tmp_path / 'out').exists()


def test_a_directory_without_weights(tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(CONFIG))
    with pytest.raises(UserError, match=r'has neither model\.safetensors nor pytorch'):
        gau_alpha.convert(tmp_path, tmp_path / 'out', tokenizer='bytes')
