"""The exported PyTorch file computes what our models compute: every model and field, documents, padding, decoding."""

import jax.numpy as jnp
import numpy as np
import pytest

from gau.models.architectures import ARCHITECTURES
from gau.models.attentions.scored import ScoredAttention
from tests.export.parity import LAYOUTS, both
from tests.models.tiny import CASES, apply, positions_of, tokens
from tests.numerics import float64, max_error

torch = pytest.importorskip('torch', reason='exports are opened with torch, which is no requirement of training')
pytest.importorskip('transformers', minversion='5.24', reason='requirements-export.txt')

HELD = [(name, objective) for name, objective in CASES if isinstance(ARCHITECTURES[name].attention, ScoredAttention)]
GATED = {'flash', 'flash_quad'}
# Keys that see the token before, and convolutions, with what is near them.
SHIFTED = [
    ('flash', 'lm', {'key_input': 'shifted', 'decay_gate': 'scalar', 'local_window': 2, 'absolute_position': 'none'}),
    ('flash', 'mlm', {'key_input': 'shifted', 'short_convolution': 2}),
    ('flash', 'lm', {'key_input': 'own', 'short_convolution': 3, 'norm_placement': 'post'}),
    ('flash_quad', 'lm', {'key_input': 'shifted', 'num_heads': 2, 'relative_bias': 'rotary'}),
    ('transformer_plus_plus', 'lm', {'short_convolution': 3, 'norm_placement': 'sandwich'}),
]
VARIANTS = [
    *(
        ('flash', 'lm', {'attention_function': name})
        for name in ('softmax', 'softmax_plus', 'laplace', 'softplus2', 'smooth_relu2')
    ),
    *(('flash_quad', 'lm', {'normalizer': name}) for name in ('visible', 'su', 'paper')),
    *(('flash', 'mlm', {'normalizer': name}) for name in ('visible', 'su', 'fixed')),
    *(('flash', objective, {'branches': name}) for name in ('local', 'global') for objective in ('lm', 'mlm')),
    ('flash', 'lm', {'global_reduction': 'sum', 'temperature': 'learned'}),
    ('flash', 'lm', {'rope': 'local'}),
    ('flash', 'lm', {'relative_bias': 'rotary', 'chunk_size': 6}),
    ('flash', 'lm', {'relative_bias': 'none', 'rope': 'none'}),
    ('flash_quad', 'lm', {'relative_bias': 'rotary', 'num_heads': 4}),
    ('flash_quad', 'mlm', {'relative_bias': 'none', 'norm': 'layer_norm', 'norm_placement': 'post'}),
    ('flash', 'lm', {'norm': 'rms_norm', 'norm_placement': 'sandwich', 'gate': 'none', 'absolute_position': 'none'}),
    ('flash', 'lm', {'relative_bias_init': 'normal', 'expansion_factor': 1.5}),
    ('flash', 'lm', {'decay_gate': 'scalar', 'output_layer': 'own'}),
    ('flash', 'lm', {'decay_gate': 'scalar', 'branches': 'global', 'global_reduction': 'sum'}),
    ('flash', 'lm', {'local_window': 2, 'decay_gate': 'scalar', 'relative_bias': 'rotary'}),
    ('flash', 'lm', {'local_window': 2, 'decay_gate': 'scalar', 'absolute_position': 'none'}),
    ('flash', 'lm', {'local_window': 2, 'branches': 'local', 'normalizer': 'visible'}),
    ('flash', 'lm', {'local_window': 2, 'global_reduction': 'sum', 'short_convolution': 1}),
    ('flash', 'lm', {'local_window': 2, 'branches': 'global'}),
    ('flash', 'lm', {'branches': 'global', 'key_input': 'shifted', 'rope': 'none'}),
    ('flash', 'mlm', {'branches': 'local', 'key_input': 'own'}),
    ('mc_transformer_plus_plus', 'mlm', {'short_convolution': 4}),
    ('flash_quad', 'mlm', {'output_layer': 'own', 'norm': 'rms_norm'}),
    ('transformer_plus_plus', 'lm', {'feed_forward': 'swiglu', 'gate': 'silu', 'relative_bias': 'toeplitz'}),
    ('transformer_plus_plus', 'mlm', {'attention_function': 'relu2', 'temperature': 'learned'}),
    ('mc_transformer_plus_plus', 'lm', {'branches': 'global'}),
    ('mc_transformer_plus_plus', 'lm', {'rope': 'local'}),
    ('mc_transformer_plus_plus', 'mlm', {'branches': 'local', 'norm': 'scale_norm', 'norm_placement': 'sandwich'}),
]
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in VARIANTS]
PLAIN = [(*case, {}) for case in HELD] + SHIFTED
CASES_AND_VARIANTS = PLAIN + SLOW
DECODED = [case for case in PLAIN if case[1] == 'lm']
DECODED += [
    mark for mark, case in zip(SLOW, VARIANTS, strict=True) if case[1] == 'lm' and 'paper' not in case[2].values()
]


@pytest.fixture(autouse=True)
def _float64():
    with float64():
        yield


def ids(case):
    return ' '.join(str(part) for part in (case[0], case[1], *(case[2] if len(case) > 2 else {}).items()))


def expect_equal(theirs, expected, real=None):
    theirs, expected = theirs.detach().numpy(), np.asarray(expected)
    if real is not None:
        theirs, expected = theirs[real], expected[real]
    assert max_error(theirs, expected) < 1e-10


@pytest.mark.parametrize('case', CASES_AND_VARIANTS, ids=ids)
def test_logits_with_documents_and_padding(case):
    name, objective, fields = case
    model, params, theirs = both(name, objective, **fields)
    layouts = list(LAYOUTS)
    ids_BN = np.array(list(LAYOUTS.values()))
    tokens_BN, positions_BN = np.asarray(tokens(len(layouts))), np.asarray(positions_of(ids_BN))
    expected = apply(model, params, jnp.asarray(tokens_BN), jnp.asarray(ids_BN), jnp.asarray(positions_BN))
    as_torch = [torch.tensor(x) for x in (tokens_BN, positions_BN, ids_BN)]
    found = theirs(as_torch[0], position_ids=as_torch[1], segment_ids=as_torch[2])
    expect_equal(found.logits, expected, real=ids_BN > 0)
    assert bool(found.logits.isfinite().all())
    # Positions begin with each document by themselves, where no document has a hole.
    whole = [layouts.index(layout) for layout in ('one', 'packed', 'right padding', 'left padding')]
    again = theirs(as_torch[0][whole], segment_ids=as_torch[2][whole])
    expect_equal(again.logits, expected[jnp.asarray(whole)], real=ids_BN[whole] > 0)
    # One document without padding: other paths.
    expect_equal(theirs(as_torch[0]).logits, apply(model, params, jnp.asarray(tokens_BN)))
    mask = (as_torch[2] > 0).long()
    padded = layouts.index('right padding')
    found = theirs(as_torch[0][[padded]], attention_mask=mask[[padded]])
    expect_equal(found.logits, expected[jnp.asarray([padded])], real=ids_BN[[padded]] > 0)


@pytest.mark.parametrize(
    'case', [pytest.param(case, marks=[pytest.mark.slow] * (case[0] != 'flash')) for case in PLAIN], ids=ids
)
def test_float32_logits_with_documents_and_padding_are_equal_to_1e_5(case):
    name, objective, fields = case
    model, params, theirs = both(name, objective, dtype='float32', **fields)
    ids_BN = np.array(list(LAYOUTS.values()))
    tokens_BN, positions_BN = np.asarray(tokens(len(ids_BN))), np.asarray(positions_of(ids_BN))
    expected = apply(model, params, jnp.asarray(tokens_BN), jnp.asarray(ids_BN), jnp.asarray(positions_BN))
    as_torch = [torch.tensor(x) for x in (tokens_BN, positions_BN, ids_BN)]
    logits = theirs(as_torch[0], position_ids=as_torch[1], segment_ids=as_torch[2]).logits
    assert logits.dtype == torch.float32
    assert expected.dtype == jnp.float32
    assert np.abs(logits.detach().numpy() - np.asarray(expected))[ids_BN > 0].max() < 1e-5


@pytest.mark.parametrize('case', DECODED, ids=ids)
def test_a_prompt_and_then_token_by_token_are_the_whole(case):
    name, objective, fields = case
    _, _, theirs = both(name, objective, **fields)
    tokens_BN = torch.tensor(np.asarray(tokens(3)))
    whole = theirs(tokens_BN).logits
    for prompt in (1, 5, 12):
        out = theirs(tokens_BN[:, :prompt], use_cache=True)
        expect_equal(out.logits, whole[:, :prompt].detach())
        for t in (prompt, prompt + 1):
            out = theirs(tokens_BN[:, t : t + 1], cache=out.cache)
            expect_equal(out.logits, whole[:, t : t + 1].detach())
        out = theirs(tokens_BN[:, prompt + 2 :], cache=out.cache)
        expect_equal(out.logits, whole[:, prompt + 2 :].detach())


@pytest.mark.parametrize(
    ('name', 'fields'),
    [
        ('flash', {}),
        ('flash_quad', {}),
        ('transformer_plus_plus', {}),
        ('flash', {'key_input': 'shifted', 'decay_gate': 'scalar', 'local_window': 2, 'short_convolution': 3}),
        pytest.param('flash', {'decay_gate': 'scalar'}, marks=pytest.mark.slow),
    ],
)
def test_padding_of_a_prompt_leaves_no_trace(name, fields):
    _, _, theirs = both(name, **fields)

    def padded(x, side, fill):
        padding = [fill] * (9 - len(x))
        return padding + x if side == 'left' else x + padding

    prompts = [tokens(1, n, seed=n)[0].tolist() for n in (3, 9, 5)]
    alone = [theirs.generate(torch.tensor([prompt]), max_new_tokens=9, do_sample=False)[0, -9:] for prompt in prompts]
    for side in ('left', 'right'):
        rows = [padded(prompt, side, 0) for prompt in prompts]
        mask = [padded([1] * len(prompt), side, 0) for prompt in prompts]
        out = theirs(torch.tensor(rows), attention_mask=torch.tensor(mask), use_cache=True)
        for row, prompt in enumerate(prompts):
            expected = theirs(torch.tensor([prompt])).logits[0]
            expect_equal(out.logits[row][torch.tensor(mask[row]).bool()], expected.detach())
        if side == 'left':
            together = theirs.generate(
                torch.tensor(rows), attention_mask=torch.tensor(mask), max_new_tokens=9, do_sample=False
            )
            assert together[:, -9:].tolist() == [row.tolist() for row in alone]


@pytest.mark.parametrize('keys', ['shared', 'shifted'])
def test_beams_take_their_states_along(keys):
    _, _, theirs = both('flash', key_input=keys)
    prompt = torch.tensor(np.asarray(tokens(2, 7)))
    fields = {'max_new_tokens': 8, 'num_beams': 4, 'do_sample': False}
    assert torch.equal(theirs.generate(prompt, **fields), theirs.generate(prompt, **fields, use_cache=False))


def test_the_state_of_flash_has_one_size():
    _, _, theirs = both('flash', key_input='shifted', local_window=2, short_convolution=3)
    sizes = set()
    for n in (1, 7, 24):
        cache = theirs(torch.tensor(np.asarray(tokens(1, n))), use_cache=True).cache
        cache = theirs(torch.zeros(1, 2, dtype=torch.long), cache=cache).cache
        sizes.add(sum(x.numel() for state in cache.layers for x in state.values()))
    assert len(sizes) == 1


def test_the_loss_is_that_of_the_shifted_tokens():
    _, _, theirs = both('flash')
    tokens_BN = tokens(2)
    log_p = torch.log_softmax(theirs(torch.tensor(np.asarray(tokens_BN))).logits, -1)
    labels = torch.tensor(np.asarray(tokens_BN))
    expected = -log_p[:, :-1].gather(-1, labels[:, 1:, None]).mean()
    assert torch.isclose(theirs(labels, labels=labels).loss, expected)
    labels_with_holes = labels.clone()
    labels_with_holes[:, 5:] = -100
    expected = -log_p[:, :4].gather(-1, labels[:, 1:5, None]).mean()
    assert torch.isclose(theirs(labels, labels=labels_with_holes).loss, expected)


@pytest.mark.parametrize(
    ('name', 'fields', 'arguments', 'message'),
    [
        ('flash_quad', {'normalizer': 'paper'}, {'use_cache': True}, 'normalizer=paper divides'),
        ('flash_quad', {}, {'length': 25}, 'relative bias of 24 positions cannot serve 25'),
        ('flash', {}, {'use_cache': True, 'segment_ids': True}, 'one document a row'),
    ],
)
def test_what_cannot_be_computed_is_refused(name, fields, arguments, message):
    _, _, theirs = both(name, **fields)
    arguments = dict(arguments)
    x = torch.zeros(1, arguments.pop('length', 4), dtype=torch.long)
    if arguments.pop('segment_ids', False):
        arguments['segment_ids'] = torch.ones_like(x)
    with pytest.raises(ValueError, match=message):
        theirs(x, **arguments)


def test_it_trains():
    _, _, theirs = both('flash', dropout_rate=0.1)
    theirs.train()
    labels = torch.tensor(np.asarray(tokens(2)))
    theirs(labels, labels=labels).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in theirs.parameters())
    assert not torch.equal(theirs(labels).logits, theirs(labels).logits)
    theirs.eval()
