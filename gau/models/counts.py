"""Parameters, FLOPs and activation bytes in closed form, from a resolved config alone (no JAX).

FLOPs are those of matrix products in one forward pass, 2 for a multiplication and addition, per token: causal quadratic
attention counts half of its square, chunked attention what a chunk of C costs (causal: half of it, and one state), the
head counts and the embedding lookup does not; neither do norms, activations and positions. A training step is three
times that; what remat computes again is never counted. Padding and packing are not considered: every token is taken to
see what a full sequence of `context` tokens lets it see.
"""

import math
from typing import NamedTuple

from ml_collections import ConfigDict

from gau.models.architectures import ARCHITECTURES
from gau.models.config import expanded_dim, head_dim_at, heads_at

BYTES = {'bfloat16': 2, 'float32': 4, 'float64': 8}
PERFORMER_CHUNK = 128


class Count(NamedTuple):
    """What one part of a model costs.

    Attributes:
      parameters: number of trained numbers.
      flops: forward FLOPs per token.
      activation_bytes: bytes per token kept for the backward pass without remat.
    """

    parameters: int
    flops: float
    activation_bytes: float

    def __add__(self, other: 'Count') -> 'Count':
        return Count(*(x + y for x, y in zip(self, other, strict=True)))


def parameters(config: ConfigDict, *, vocab_size: int) -> int:
    """Returns the number of parameters of the model of a resolved config."""
    # Parameters depend on neither the context nor causality: what does is already resolved.
    return sum(part.parameters for _, part in table(config, context=1, vocab_size=vocab_size, causal=False))


def flops_per_token(config: ConfigDict, *, context: int, vocab_size: int, causal: bool) -> float:
    """Returns the FLOPs of one forward pass per token, head included (see the module)."""
    return sum(part.flops for _, part in table(config, context=context, vocab_size=vocab_size, causal=causal))


def activation_bytes_per_token(config: ConfigDict, *, context: int, vocab_size: int, causal: bool) -> float:
    """Returns the bytes per token that a training step keeps from forward to backward pass.

    Counted are the inputs of matrix products and of the functions between them, each once, in the compute type;
    attention matrices in float32 and in the compute type, as the reference keeps them; and a layer's relative bias,
    [H, N, N] (in chunks [H, C, C]) in float32 with every implementation, counted as for a batch of 1: a larger one
    shares it. XLA fuses some away and keeps some twice: take it for the order of magnitude and for how it grows. With
    remat=full: one residual stream a layer, and one layer's own activations while it is run again. `dots` and
    `dots_no_batch` lie between and are counted as 'none'.
    """
    parts = table(config, context=context, vocab_size=vocab_size, causal=causal)
    layers = [part.activation_bytes for name, part in parts if name.startswith('layer')]
    rest = sum(part.activation_bytes for name, part in parts if not name.startswith('layer'))
    if config.remat == 'full':
        stream = config.model_dim * BYTES[config.dtype]
        return rest + stream * len(layers) + max(layers)
    return rest + sum(layers)


def table(config: ConfigDict, *, context: int, vocab_size: int, causal: bool) -> list[tuple[str, Count]]:
    """Returns the model part by part: embedding, one line a layer, final norm, head."""
    d, size = config.model_dim, BYTES[config.dtype]
    sinusoid = int(config.absolute_position == 'sinusoid')
    parts = [('embedding', Count(vocab_size * d + sinusoid, 0, d * size))]
    gau = ARCHITECTURES[config.name].family == 'gau'
    for layer in range(config.num_layers):
        if gau:
            parts.append((f'layer {layer}', _gau(config, layer, context, causal)))
        else:
            parts.append((f'layer {layer}', _attention(config, layer, context, causal) + _feed_forward(config)))
    if config.norm_placement == 'pre':
        parts.append(('final norm', _norm(config)))
    # Of the logits nothing is kept: what waits for the backward pass is the gradient of the hidden states.
    parts.append(('head (tied)', Count(0, 2 * d * vocab_size, d * size)))
    return parts


def _norm(config: ConfigDict) -> Count:
    d = config.model_dim
    numbers = {'scale_norm': 1, 'rms_norm': d, 'layer_norm': 2 * d}[config.norm]
    return Count(numbers, 0, 2 * d * BYTES[config.dtype])


def _linear(inputs: int, outputs: int) -> Count:
    """A dense layer with bias; its activations are counted by who uses them."""
    return Count(inputs * outputs + outputs, 2 * inputs * outputs, 0)


def _kept(config: ConfigDict, numbers: float, *, matrix: float = 0) -> Count:
    """`numbers` per token in the compute type, `matrix` attention weights (scores float32, weights compute type)."""
    size = BYTES[config.dtype]
    return Count(0, 0, numbers * size + matrix * (max(4, size) + size))


def _gau(config: ConfigDict, layer: int, context: int, causal: bool) -> Count:
    d, e, s, h = config.model_dim, expanded_dim(config), config.query_key_dim, heads_at(config, layer)
    gate = config.gate == 'silu'
    roles = 4 if config.branches == 'both' else 2
    count = _norm(config) + _linear(d, (1 + gate) * e) + _linear(d, s) + _linear(e, d)
    count += Count(roles * 2 * h * s, 0, 0) + _bias(config, h, s) + _temperature(config)
    # Before and after silu, the roles, attention's output, and the gated output.
    count += _kept(config, 2 * (1 + gate) * e + 2 * s + roles * h * s + (1 + gate) * e)
    if ARCHITECTURES[config.name].attention == 'quadratic':
        return count + _quadratic(config, h, s, e / h, context, causal)
    return count + _mixed_chunk(config, h, s, e / h, context, causal)


def _attention(config: ConfigDict, layer: int, context: int, causal: bool) -> Count:
    d, h, k = config.model_dim, heads_at(config, layer), head_dim_at(config, layer)
    gate = config.gate == 'silu'
    count = _norm(config) + _linear(d, 3 * h * k) + _linear(h * k, d)
    if gate:
        count += _linear(d, h * k)
    count += _kept(config, (3 + 1 + 3 * gate) * h * k)
    kind = ARCHITECTURES[config.name].attention
    if kind == 'quadratic':
        count += _bias(config, h, k) + _temperature(config)
        count += _quadratic(config, h, k, k, context, causal)
    elif kind == 'mixed_chunk':
        if config.branches != 'local':
            count += Count(4 * h * k, 0, 0) + _kept(config, 2 * h * k)
        count += _bias(config, h, k) + _temperature(config)
        count += _mixed_chunk(config, h, k, k, context, causal)
    elif kind == 'performer':
        count += _performer(config, h, k, context, causal)
    elif kind == 'linformer':
        r = config.projection_rank
        count += Count(2 * config.projection_length * r, 8 * h * r * k, 0) + _kept(config, 0, matrix=h * r)
    elif kind == 'combiner':
        count += _combiner(config, h, k, context, causal)
    return count


def _feed_forward(config: ConfigDict) -> Count:
    d, e = config.model_dim, config.feed_forward_dim
    gated = config.feed_forward != 'gelu'
    count = _norm(config) + _linear(d, (1 + gated) * e) + _linear(e, d)
    return count + _kept(config, (2 + 2 * gated) * e)


def _bias(config: ConfigDict, heads: int, width: int) -> Count:
    if config.relative_bias == 'toeplitz':
        return Count(heads * (2 * config.relative_bias_length - 1), 0, 0)
    return Count(2 * heads * width if config.relative_bias == 'rotary' else 0, 0, 0)


def _bias_matrix(config: ConfigDict, heads: int, length: int, context: int) -> Count:
    """The relative bias of all pairs of `length` positions, over the tokens of one sequence."""
    exists = config.relative_bias in ('toeplitz', 'rotary')
    return Count(0, 0, exists * heads * length**2 / context * max(4, BYTES[config.dtype]))


def _temperature(config: ConfigDict) -> Count:
    return Count(int(config.temperature == 'learned'), 0, 0)


def _quadratic(config: ConfigDict, h: int, width: int, value_width: float, context: int, causal: bool) -> Count:
    seen = context / 2 if causal else context
    matrix = h * context if config.impl == 'reference' or context <= 1024 else 0
    count = Count(0, 2 * h * seen * (width + value_width), 0) + _kept(config, 0, matrix=matrix)
    return count + _bias_matrix(config, h, context, context)


def _mixed_chunk(config: ConfigDict, h: int, width: int, value_width: float, context: int, causal: bool) -> Count:
    c = min(config.chunk_size, context)
    flops = matrix = state = 0.0
    bias = Count(0, 0, 0)
    if config.branches != 'global':
        flops += 2 * h * (c / 2 if causal else c) * (width + value_width)
        matrix = h * c
        bias = _bias_matrix(config, h, c, context)
    if config.branches != 'local' and (context > c or not causal):
        # One k v^T and one q M for every token.
        flops += 4 * h * width * value_width
        state = h * width * value_width / c
    return Count(0, flops, 0) + _kept(config, 2 * state, matrix=matrix) + bias


def _performer(config: ConfigDict, h: int, k: int, context: int, causal: bool) -> Count:
    features = config.num_features if config.feature_map == 'favor' else k
    flops = 4 * h * k * features if config.feature_map == 'favor' else 0
    flops += 4 * h * features * (k + 1)
    matrix = 0
    if causal:
        c = min(PERFORMER_CHUNK, context)
        flops += 2 * h * (c / 2) * (features + k + 1)
        matrix = h * c
    return Count(0, flops, 0) + _kept(config, 2 * h * features, matrix=matrix)


def _combiner(config: ConfigDict, h: int, k: int, context: int, causal: bool) -> Count:
    c = min(config.chunk_size, context)
    rows = math.ceil(context / c)
    # Row and summaries (scores and values of both), then three column products and the mean of the queries and keys.
    half = 0.5 if causal else 1
    flops = 4 * h * k * c * half + 4 * h * k * c + 8 * h * k * rows * half
    return Count(0, flops, 0) + _kept(config, 3 * h * k, matrix=h * (2 * c + 2 * rows))
