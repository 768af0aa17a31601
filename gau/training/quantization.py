"""Products in 8 bits, in training and evaluation, by qwix: `config.quantization`.

The kernels of the layers are rounded, a scale for each output; with `int8` what they are multiplied with too, a scale
for each token. The products of attention, norms, the embedding and the output layer keep the compute type. Parameters
stay float32, and gradients go through the rounding as if it were not there.
"""

from typing import Any

import flax.linen as nn

from gau.errors import UserError
from gau.training.config import QUANTIZATIONS

# What a layer multiplies with a kernel: the names of the `Linear` modules in gau/layers.
LAYERS = r'(.*/)?blocks(_\d+)?/(.*/)?(uv|u|v|z|z_key|out|qkv|q|kv|gate|in)'
# What is asked of a model with whole sequences.
METHODS = ('__call__', 'hidden', 'token_losses', 'weighted_loss')
# Implementations whose products qwix sees; kernels of our own have theirs.
SEEN = ('xla', 'reference', 'cudnn', 'splash')


def quantised(model: nn.Module, quantization: str) -> nn.Module:
    """Returns the model, whose layers multiply in 8 bits.

    Args:
      model: an objective's.
      quantization: a name of QUANTIZATIONS but `none`.

    Raises:
      UserError: qwix is missing, or the model's implementation has products that qwix does not see.
    """
    assert quantization in QUANTIZATIONS
    try:
        import jax.numpy as jnp
        import qwix
    except ImportError as error:
        raise UserError(f'quantization={quantization} needs qwix: pip install -r requirements-compress.txt') from error
    built: Any = model.implementation
    if built.attention not in SEEN or built.norm not in SEEN:
        raise UserError(
            f'quantization={quantization}: qwix sees the products of XLA, and model.impl={built.attention} has kernels '
            'of its own: use model.impl=xla'
        )
    activations = jnp.int8 if quantization == 'int8' else None
    rule = qwix.QtRule(module_path=LAYERS, weight_qtype=jnp.int8, act_qtype=activations)
    methods = [name for name in METHODS if hasattr(type(model), name)]
    return qwix.quantize_model(model, qwix.QtProvider([rule]), methods=methods)
