"""Parameters, FLOPs and activation bytes in closed form, from a resolved config alone (no JAX).

FLOPs are those of matmuls in one forward pass, 2 for a multiplication and addition, per token: causal quadratic
attention counts half of its square, chunked attention what a chunk of C costs (causal: half of it, and one state), the
head counts and the embedding lookup does not; neither do norms, activations and positions. A training step is three
times that; what remat computes again is never counted. Padding and packing are not considered: every token is taken to
see what a full sequence of `context` tokens lets it see.

What a block costs, its records say (`families`, `attentions`); `costs` has the parts that they add up.
"""

from ml_collections import ConfigDict

from gau.models.architectures import ARCHITECTURES
from gau.models.costs import BYTES, Count, norm


def parameters(config: ConfigDict, *, vocab_size: int) -> int:
    """Returns the number of parameters of the model of a resolved config."""
    # Parameters depend on neither the context nor causality: what does is already resolved.
    return sum(part.parameters for _, part in table(config, context=1, vocab_size=vocab_size, causal=False))


def flops_per_token(config: ConfigDict, *, context: int, vocab_size: int, causal: bool) -> float:
    """Returns the FLOPs of one forward pass per token, head included (see the module)."""
    return sum(part.flops for _, part in table(config, context=context, vocab_size=vocab_size, causal=causal))


def activation_bytes_per_token(config: ConfigDict, *, context: int, vocab_size: int, causal: bool) -> float:
    """Returns the bytes per token that a training step saves from forward to backward pass.

    Counted are the inputs of matmuls and of the functions between them, each once, in the compute type; attention
    matrices in float32 and in the compute type, as the reference saves them; and a layer's relative bias, [H, N, N] (in
    chunks [H, C, C]) in float32 with every implementation, counted as for a batch of 1: a larger one shares it. XLA
    fuses some away and saves some twice: take it for the order of magnitude and for how it grows. With remat=full: one
    residual stream a layer, and one layer's own activations while it is run again. `dots` and `dots_no_batch` lie
    between and are counted as 'none'.
    """
    parts = table(config, context=context, vocab_size=vocab_size, causal=causal)
    layers = [part.activation_bytes for name, part in parts if name.startswith('layer')]
    rest = sum(part.activation_bytes for name, part in parts if not name.startswith('layer'))
    if config.remat == 'full':
        stream = config.model_dim * BYTES[config.dtype]
        return rest + stream * len(layers) + max(layers)
    return rest + sum(layers)


def state_bytes(config: ConfigDict, *, context: int) -> int | None:
    """Returns the bytes of the decoding state of one sequence, with room for `context` tokens where it keeps them all.

    None: a causal model of this config cannot be decoded, or its records do not say how large its state is.
    """
    family, attention, _ = ARCHITECTURES[config.name]
    if attention.refuses_decoding(config) is not None:
        return None
    layer = family.state_bytes(config, attention, context=context)
    # And the position, an int32.
    return None if layer is None else round(config.num_layers * layer) + 4


def table(config: ConfigDict, *, context: int, vocab_size: int, causal: bool) -> list[tuple[str, Count]]:
    """Returns the model part by part: embedding, one line a layer, final norm, head."""
    d, size = config.model_dim, BYTES[config.dtype]
    family, attention, _ = ARCHITECTURES[config.name]
    sinusoid = int(config.absolute_position == 'sinusoid')
    parts = [('embedding', Count(vocab_size * d + sinusoid, 0, d * size))]
    for layer in range(config.num_layers):
        cost = family.count(config, attention, layer=layer, context=context, causal=causal)
        parts.append((f'layer {layer}', cost))
    if config.norm_placement != 'post':
        parts.append(('final norm', norm(config)))
    # Of the logits nothing is saved: what waits for the backward pass is the gradient of the hidden states.
    own = vocab_size * d if config.output_layer == 'own' else 0
    parts.append(('head' if own else 'head (tied)', Count(own, 2 * d * vocab_size, d * size)))
    return parts
