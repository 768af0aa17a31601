"""ONNX graphs in onnxruntime against our models: any batch and length, documents, padding, and FLASH step by step."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gau
from gau.export.exporting import export
from gau.training import loop
from tests.export.parity import LAYOUTS, both
from tests.models.tiny import apply, positions_of, tokens
from tests.numerics import float64, max_error
from tests.training.tiny import tiny_config

torch = pytest.importorskip('torch', reason='requirements-export.txt')
pytest.importorskip('transformers', minversion='5.24', reason='requirements-export.txt')
pytest.importorskip('onnxscript', reason='requirements-export.txt')
onnxruntime = pytest.importorskip('onnxruntime', reason='requirements-export.txt')

MODELS = [
    *(('flash', objective, {}) for objective in ('lm', 'mlm')),
    *((name, 'lm', {}) for name in ('flash_quad', 'transformer_plus_plus')),
    ('flash', 'lm', {'key_input': 'shifted', 'decay_gate': 'scalar', 'local_window': 2, 'absolute_position': 'none'}),
]
SLOW = [
    ('mc_transformer_plus_plus', 'lm', {}),
    ('flash_quad', 'mlm', {'output_layer': 'own'}),
    ('transformer_plus_plus', 'mlm', {}),
    ('flash', 'lm', {'decay_gate': 'scalar', 'rope': 'local'}),
    ('flash', 'lm', {'decay_gate': 'scalar', 'absolute_position': 'none'}),
    ('flash', 'mlm', {'key_input': 'shifted', 'short_convolution': 4}),
    ('flash', 'lm', {'key_input': 'own', 'short_convolution': 3}),
]
MODELS += [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW]


def opened(directory, name):
    return onnxruntime.InferenceSession(str(directory / name))


@pytest.mark.parametrize(('name', 'objective', 'fields'), MODELS)
def test_graphs_compute_what_the_model_does(name, objective, fields, tmp_path):
    from gau.export.onnx import write_graphs

    with float64():
        model, params, theirs = both(name, objective, **fields)
        shapes = write_graphs(theirs.float(), tmp_path)
        theirs.double()
        ids_BN = np.array(list(LAYOUTS.values()))
        tokens_BN, positions_BN = np.asarray(tokens(len(ids_BN))), np.asarray(positions_of(ids_BN))
        forward = opened(tmp_path, 'model.onnx')
        for rows, n in ((len(ids_BN), 24), (3, 17), (1, 1), (2, 5)):
            own = [x[:rows, :n].astype(np.int64) for x in (tokens_BN, ids_BN, positions_BN)]
            found = forward.run(None, dict(zip(('input_ids', 'segment_ids', 'position_ids'), own, strict=True)))[0]
            expected = np.asarray(apply(model, params, *map(jnp.asarray, own)))
            assert max_error(found[own[1] > 0], expected[own[1] > 0]) < 1e-5
            assert np.isfinite(found).all()
        has_step = objective == 'lm' and theirs.config.chunk_size is not None
        assert bool(shapes) == has_step
        if not shapes:
            assert not (tmp_path / 'decode.onnx').exists()
            return
        decoder = opened(tmp_path, 'decode.onnx')
        whole = np.asarray(apply(model, params, jnp.asarray(tokens_BN[:3])))
        state = {key: np.zeros((3, *shape), np.float32) for key, shape in shapes.items()}
        for position in range(24):
            here = {'input_ids': tokens_BN[:3, position].astype(np.int64), 'position': np.full(3, position)}
            logits, *new = decoder.run(None, here | state)
            state = dict(zip(state, new, strict=True))
            assert max_error(logits, whole[:, position]) < 1e-5


@pytest.mark.slow
def test_the_command_s_directory_is_used_as_its_card_says(tmp_path, monkeypatch):
    loop.train(tiny_config(), tmp_path / 'run')
    export(tmp_path / 'run', tmp_path / 'out', format='onnx')
    run, params, _ = gau.load_run(tmp_path / 'run')
    card = (tmp_path / 'out/README.md').read_text()
    program = ''.join(block.split('```')[0] for block in card.split('```python\n')[1:])
    monkeypatch.chdir(tmp_path / 'out')
    config = json.loads((tmp_path / 'out/config.json').read_text())
    prompt = [config['tokenizer']['bos_id'], *b'def f():']
    found = {}
    exec(program.replace('[TOKENS]', f'[{prompt}]'), found)
    with jax.default_matmul_precision('float32'):
        expected = run.model.apply({'params': params}, jnp.asarray([prompt]))[:, -1]
    np.testing.assert_allclose(found['logits'], expected, atol=1e-5)
