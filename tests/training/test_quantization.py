"""Products in 8 bits: of the layers' kernels alone, or with activations; what qwix does not see is refused."""

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau import compression
from gau.errors import UserError
from gau.training import evaluate, loop
from gau.training.quantization import quantised
from tests.models.tiny import make, tokens
from tests.numerics import max_error
from tests.programs import call
from tests.training.tiny import read_metrics, tiny_config

pytest.importorskip('qwix', reason='requirements-compress.txt')


@pytest.mark.slow
def test_weights_are_rounded_as_compress_rounds_them():
    for name, fields in (('flash', {}), ('transformer_plus_plus', {'layer_stack': 'scan'})):
        model, params = make(name, dtype='float32', **fields)
        params = jax.tree.map(lambda x: x.astype(jnp.float32), params)
        leaves = {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(params).items()}
        rounded = compression.rounded(leaves, model.config).params
        embedding = {path: leaves[path] for path in leaves if path[0] == 'embedding'}
        expected = model.apply({'params': flax.traverse_util.unflatten_dict(rounded | embedding)}, tokens(2))
        logits = quantised(model, 'int8_weights').apply({'params': params}, tokens(2))
        plain = model.apply({'params': params}, tokens(2))
        assert max_error(logits, expected) < 0.02 * max_error(plain, expected)


# The run below trains with it.
@pytest.mark.slow
def test_activations_are_rounded_too_and_gradients_go_through():
    model, params = make('flash', dtype='float32', num_layers=1)
    params = jax.tree.map(lambda x: x.astype(jnp.float32), params)

    def loss(model, params):
        fields = {'method': 'weighted_loss'}
        return model.apply({'params': params}, tokens(1), tokens(1), jnp.ones((1, 24)), **fields)

    plain, gradient = jax.value_and_grad(lambda params: loss(model, params))(params)
    found, rounded = jax.value_and_grad(lambda params: loss(quantised(model, 'int8'), params))(params)
    weights = loss(quantised(model, 'int8_weights'), params)
    assert len({float(plain), float(found), float(weights)}) == 3
    assert found == pytest.approx(float(plain), rel=0.05)
    kernel, other = (tree['blocks_0']['gau']['uv']['kernel'] for tree in (gradient, rounded))
    cosine = (kernel * other).sum() / jnp.linalg.norm(kernel) / jnp.linalg.norm(other)
    assert cosine > 0.95


def test_a_run_trains_and_is_read_with_it(tmp_path):
    loop.train(tiny_config(quantization='int8', steps=5), tmp_path / 'run')
    evaluate.evaluate(tmp_path / 'run')
    code, out, err = call('scripts/sample.py', f'--workdir={tmp_path / "run"}', '--prompt=x')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'quantization=int8 is not decoded; scripts/compress.py --method=rounded' in err
    assert read_metrics(tmp_path / 'run')[-1]['loss'] < 5.7
    with pytest.raises(UserError, match='quantization="int4" is unknown; did you mean "int8"'):
        loop.train(tiny_config(quantization='int4'), tmp_path / 'none')
    model, _ = make('flash')
    kernels = model.clone(implementation=model.implementation._replace(attention='triton'))
    with pytest.raises(UserError, match=r'qwix sees the products of XLA, and model.impl=triton .* use model.impl=xla'):
        quantised(kernels, 'int8')
