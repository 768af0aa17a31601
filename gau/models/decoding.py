"""Decoding of causal models: the state, `prefill` for a prompt, `step` for one token.

The state is a plain tree of arrays (nested dicts, all zeros at the start of a sequence), so it can be saved, copied and
cut by rows:

    position                            int32 [B], tokens that each row has read
    blocks_0/gau/..., blocks_1/...      the layers' own (`gau.ops.decoding`), with the heads H after B:
      FLASH, MC-TFM++                   v [B, H, C, E/H], k and k_lin [B, H, C, S] (compute type), sum [B, H, S, E/H]
      FLASH-Quad, Transformers          k [B, H, M, S], v [B, H, M, E/H] (compute type), M the capacity
      Performer                         sum [B, H, F, K + 1]; with FAVOR+ log_scale [B, H]

The sums are float32 (float64 in float64). With `layer_stack='scan'` the layers' arrays have a first axis more, the
layers'. FLASH's number of tokens in its sum is no array of its own: C * (position // C).

These functions are traced: call them inside `jax.jit`, and donate the state so that it is updated in place.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.language_model import LanguageModel
from gau.ops.decoding import DecodePosition

State = dict[str, Any]

# Tokens of a prompt that are prefilled at once: memory does not grow with the prompt, and matrices are large enough.
PREFILL_BLOCK = 512


def keeps_all_tokens(model: LanguageModel) -> bool:
    """Returns whether the state has keys and values of every token, so that it needs a capacity."""
    return ARCHITECTURES[model.config.name].attention.keeps_all_tokens


def check(model: LanguageModel, *, capacity: int | None = None) -> None:
    """Says in one line what cannot be decoded.

    Raises:
      UserError: a bidirectional model; an attention that has no state, or none in this config; a capacity beyond the
        longest sequence that it can decode.
    """
    attention = ARCHITECTURES[model.config.name].attention
    if not model.causal:
        raise UserError('a masked language model cannot be decoded: its tokens see later ones')
    reason = attention.refuses_decoding(model.config)
    if reason is not None:
        raise UserError(reason)
    longest = attention.longest_decoded(model.config)
    if capacity is not None and longest is not None and capacity > longest:
        raise UserError(
            f'this model has relative positions for {longest} tokens (relative_bias_length); prompt and continuation '
            f'together would be {capacity}'
        )


def init_state(model: LanguageModel, *, batch_size: int, capacity: int | None = None) -> State:
    """Returns the state before the first token.

    Args:
      model: a causal model.
      batch_size: B.
      capacity: M, most tokens of a sequence, for models that keep all tokens; the state of others has one size.

    Raises:
      UserError: see `check`; or a model that keeps all tokens and no capacity.
    """
    check(model, capacity=capacity)
    if keeps_all_tokens(model) and not capacity:
        raise UserError(f'{model.config.name} keeps the keys and values of all tokens and needs a capacity for them')

    def read():
        tokens_B1, length_B = jnp.zeros((batch_size, 1), jnp.int32), jnp.zeros(batch_size, jnp.int32)
        params = model.init(jax.random.key(0), tokens_B1)['params']
        position = DecodePosition(length_B, length_B, capacity)
        cache = model.apply({'params': params}, tokens_B1, position, method='extend', mutable=['cache'])[1]['cache']
        return {'position': length_B, **cache}

    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(read))


def extend(model: LanguageModel, params: Any, state: State, tokens_BT: Array, length_B: Array) -> tuple[Array, State]:
    """Reads a block of T tokens, right-padded: row b takes the first length_B[b] (0..T).

    Returns:
      What the output layer reads, [B, T, D], meaningless at padding; and the new state.
    """
    layers = {name: leaf for name, leaf in state.items() if name != 'position'}
    position = DecodePosition(state['position'], length_B)
    h_BTD, new = model.apply(
        {'params': params, 'cache': layers}, tokens_BT, position, method='extend', mutable=['cache']
    )
    return h_BTD, {'position': state['position'] + length_B, **new['cache']}


def step(model: LanguageModel, params: Any, state: State, tokens_B: Array) -> tuple[Array, State]:
    """Reads one token a row; returns the logits of the next, [B, V] float32 (float64), and the new state.

    Past the capacity of a model that has one the logits are NaN.
    """
    h_B1D, state = extend(model, params, state, tokens_B[:, None], jnp.ones_like(tokens_B, jnp.int32))
    return model.apply({'params': params}, h_B1D, method='logits')[:, 0], state


def prefill(
    model: LanguageModel,
    params: Any,
    state: State,
    tokens_BN: Array,
    length_B: Array,
    *,
    block: int = PREFILL_BLOCK,
) -> tuple[Array, State]:
    """Reads prompts in parallel, `block` tokens of every row at a time.

    Args:
      model: a causal model.
      params: its parameters.
      state: from `init_state`, or of sequences to go on with.
      tokens_BN: prompts, padded on the right.
      length_B: int32, tokens of each prompt, 1..N (0 leaves the row's state alone; its logits say nothing).
      block: tokens at a time; memory grows with it and not with N.

    Returns:
      The logits of the token after each prompt, [B, V] float32 (float64), and the new state.
    """
    batch, n = tokens_BN.shape
    block = min(block, n)
    blocks = -(-n // block)
    tokens_GBT = jnp.pad(tokens_BN, ((0, 0), (0, blocks * block - n))).reshape(batch, blocks, block).swapaxes(0, 1)

    def read(carry, xs):
        last_BD, state = carry
        first, tokens_BT = xs
        here_B = jnp.clip(length_B - first, 0, block).astype(jnp.int32)
        h_BTD, state = extend(model, params, state, tokens_BT, here_B)
        own_BD = jnp.take_along_axis(h_BTD, jnp.maximum(here_B - 1, 0)[:, None, None], axis=1)[:, 0]
        return (jnp.where(here_B[:, None] > 0, own_BD, last_BD), state), None

    last_BD = jnp.zeros((batch, model.config.model_dim), model.config.dtype)
    (last_BD, state), _ = jax.lax.scan(read, (last_BD, state), (jnp.arange(blocks) * block, tokens_GBT))
    return model.apply({'params': params}, last_BD[:, None], method='logits')[:, 0], state


def map_rows(function, *states: State, stacked: bool) -> State:
    """Returns function(*arrays) over states with the batch axis of every array moved to the front.

    Args:
      function: from arrays [B, ...] to an array [B', ...].
      states: one or more states of the same model.
      stacked: whether the layers' arrays have a first axis of layers (`layer_stack='scan'`).
    """

    def one(path, *leaves):
        axis = 1 if stacked and path[0].key != 'position' else 0
        return jnp.moveaxis(function(*(jnp.moveaxis(leaf, axis, 0) for leaf in leaves)), 0, axis)

    return jax.tree_util.tree_map_with_path(one, *states)


def state_bytes(state: State) -> int:
    """Returns the size of a state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
