"""Decoding of causal models: the state, `prefill` for a prompt, `decode` for what
follows, `step` for one token.

The state is a plain tree of arrays (nested dicts, all zeros at the start of a sequence), so it can be saved, copied and
cut by rows:

    position                            int32 [B], tokens that each row has read
    blocks_0/gau/..., blocks_1/...      the layers' own (`gau.ops.decoding`), with the heads H after B:
      FLASH, MC-TFM++                   v [B, H, C, E/H], k and k_lin [B, H, C, S] (compute type), sum [B, H, S, E/H]
        with a window of two chunks     2 C places; with a gate also gate [B, H, C, L] and count [B, H, L], float32
        with one far chunk              far_k [B, 2 C, S] and far_v [B, C, E] as well
        with more, G = ceil(M / C)      far_k [B, G C, S], far_v [B, G C, E] and small ones (`gau.ops.far_decoding`)
      FLASH-Quad, Transformers          k [B, H, M, S], v [B, H, M, E/H] (compute type), M the capacity
      a short convolution               before [B, W, D], in blocks_0/short_convolution, beside gau
      shifted keys                      before [B, 1, S], in blocks_0/gau/key_shift
      Performer                         sum [B, H, F, K + 1]; with FAVOR+ log_scale [B, H]

The sums are float32 (float64 in float64). With `layer_stack='scan'` the layers' arrays have a first axis more, the
layers'. FLASH's number of tokens in its sum is no array of its own: C * (position // C).

These functions are traced: call them inside `jax.jit`, and donate the state so that it is updated in place.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gau.errors import UserError
from gau.layers.short_convolution import BEFORE
from gau.models.architectures import ARCHITECTURES
from gau.models.language_model import LanguageModel
from gau.ops.decoding import DecodePosition

State = dict[str, Any]

# Tokens of a row that the reference prefills at once: memory does not grow with the prompt, and matrices are large
# enough; tokens of all rows together that training's kernels do; and the most of whole prompts, whose activations are
# all there.
PREFILL_BLOCK = 512
WHOLE_BLOCK_TOKENS = 16_384
MOST_WHOLE_TOKENS = 2**18
# The most tokens of all rows that are short prompts: one block, whose chunks look at each other, where launches would
# take longer than training's kernels.
SHORT_PROMPT_TOKENS = 2048

# What XLA is told where a prefill is compiled: it runs once, and to make a CUDA graph of it takes longer than launches.
PREFILL_OPTIONS = {'gpu': (('xla_gpu_enable_command_buffer', ''),)}


def prefill_compiler_options(model: LanguageModel) -> tuple[tuple[str, Any], ...]:
    """Returns what XLA should be told, names and values, where `prefill` is compiled."""
    return (*model.implementation.compiler_options, *PREFILL_OPTIONS.get(jax.default_backend(), ()))


def what_keeps_all_tokens(model: LanguageModel) -> str | None:
    """Returns why the state has keys and values of every token, so that it needs a capacity; None: it has not.

    It is the name of the model, or a field with its value.
    """
    return ARCHITECTURES[model.config.name].attention.what_keeps_all_tokens(model.config)


def check(model: LanguageModel, *, capacity: int | None = None) -> None:
    """Says in one line what cannot be decoded.

    Raises:
      UserError: no language model, or a bidirectional one; an attention that has no state, or none in this config; a
        capacity beyond the longest sequence that it can decode.
    """
    if not isinstance(model, LanguageModel):
        raise UserError(f'a model with a head of its own ({type(model).__name__}) has no next token to decode')
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
    if not what_keeps_all_tokens(model):
        capacity = None
    elif not capacity:
        raise UserError(
            f'{what_keeps_all_tokens(model)} keeps the keys and values of all tokens and needs a capacity for them'
        )
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), _abstract_state(model, batch_size, capacity))


@functools.lru_cache(maxsize=64)
def _abstract_state(model: LanguageModel, batch_size: int, capacity: int | None) -> State:
    """Returns shapes and types of a state; found by tracing a step, which takes seconds for a deep model."""

    def read():
        tokens_B1, length_B = jnp.zeros((batch_size, 1), jnp.int32), jnp.zeros(batch_size, jnp.int32)
        params = model.init(jax.random.key(0), tokens_B1)['params']
        position = DecodePosition(length_B, length_B, capacity=capacity)
        cache = model.apply({'params': params}, tokens_B1, position, method='extend', mutable=['cache'])[1]['cache']
        return {'position': length_B, **cache}

    return jax.eval_shape(read)


def in_compute_type(model: LanguageModel, params: Any) -> Any:
    """Returns the parameters with matrices in the compute type, as layers cast them: once, and not in every step."""

    def cast(path, leaf):
        return leaf.astype(model.config.dtype) if path[-1].key == 'kernel' else leaf

    return jax.tree_util.tree_map_with_path(cast, params)


def extend(
    model: LanguageModel,
    params: Any,
    state: State,
    tokens_BT: Array,
    length_B: Array,
    *,
    opened_B: Array | None = None,
    reader: str = 'reference',
) -> tuple[Array, State]:
    """Reads a block of T tokens, right-padded: row b takes the first length_B[b] (0..T).

    Args:
      model: a causal model.
      params: its parameters.
      state: from `init_state`, or of sequences to go on with.
      tokens_BT: the next tokens of every row.
      length_B: int32, how many of them are the row's.
      opened_B: where the state is one that `open_window` opened, the positions then; T is 1.
      reader: what reads the block (`DecodePosition`).

    Returns:
      What the output layer reads, [B, T, D], meaningless at padding; and the new state.
    """
    layers = {name: leaf for name, leaf in state.items() if name != 'position'}
    position = DecodePosition(state['position'], length_B, opened_B, reader, in_place=not _scanned(model))
    h_BTD, new = model.apply(
        {'params': params, 'cache': layers}, tokens_BT, position, method='extend', mutable=['cache']
    )
    return h_BTD, {'position': state['position'] + length_B, **new['cache']}


def step(
    model: LanguageModel, params: Any, state: State, tokens_B: Array, *, opened_B: Array | None = None
) -> tuple[Array, State]:
    """Reads one token a row; returns the logits of the next, [B, V] float32 (float64), and the new state.

    Past the capacity of a model that has one the logits are NaN. `opened_B` is that of `extend`.
    """
    h_B1D, state = extend(
        model, params, state, tokens_B[:, None], jnp.ones_like(tokens_B, jnp.int32), opened_B=opened_B
    )
    return model.apply({'params': params}, h_B1D, method='logits')[:, 0], state


def decode(
    model: LanguageModel,
    params: Any,
    state: State,
    logits_BV: Array,
    draw: Callable[[Array, Array], Array],
    numbers_N: Array,
) -> tuple[Array, State, Array]:
    """Draws a token of every row from the logits and reads it, once for each of N numbers, in a loop on the device.

    Steps are alike and without branches, so that XLA can launch one as a CUDA graph: a state with chunks is opened for
    a few tokens (`gau.ops.chunk_window`), and complete chunks are added to its sum when it is closed.

    Args:
      model: a causal model.
      params: its parameters, best those of `in_compute_type`.
      state: after some tokens.
      logits_BV: of the tokens that come next.
      draw: from logits [B, V] and a number to int32 tokens [B].
      numbers_N: what `draw` is told, one after the other.

    Returns:
      The tokens [N, B], the state after them, and the logits of the tokens that come next.
    """
    attention, n = ARCHITECTURES[model.config.name].attention, len(numbers_N)
    most = attention.window(model.config) or n
    window = next(tokens for tokens in range(min(most, n), 0, -1) if n % tokens == 0)

    def one(carry, number):
        logits_BV, opened, opened_B = carry
        tokens_B = draw(logits_BV, number).astype(jnp.int32)
        logits_BV, opened = step(model, params, opened, tokens_B, opened_B=opened_B)
        return (logits_BV, opened, opened_B), tokens_B

    def whole_window(carry, numbers_T):
        logits_BV, state = carry
        start_B = state['position']
        opened = _layer_states(lambda layer: attention.open_window(model.config, layer, window), state)
        (logits_BV, opened, _), tokens_TB = jax.lax.scan(one, (logits_BV, opened, start_B), numbers_T)
        fields = {'start_B': start_B, 'end_B': opened['position']}
        state = _layer_states(functools.partial(attention.close_window, model.config, **fields), state, opened)
        return (logits_BV, state), tokens_TB

    carry = logits_BV, state
    if window == n:
        (logits_BV, state), tokens_NB = whole_window(carry, numbers_N)
        return tokens_NB, state, logits_BV
    (logits_BV, state), tokens_GTB = jax.lax.scan(whole_window, carry, numbers_N.reshape(-1, window))
    return tokens_GTB.reshape(n, -1), state, logits_BV


def _layer_states(function: Callable[..., dict], state: State, *others: State) -> State:
    """Applies a function to the states of each attention, dicts of arrays; what is no attention's is the last's."""

    def one(*nodes):
        if not isinstance(nodes[0], dict):
            return nodes[-1]
        # A layer's state may lie beside those of its parts.
        parts = [name for name, value in nodes[0].items() if isinstance(value, dict)]
        own = [{name: value for name, value in node.items() if name not in parts} for node in nodes]
        rest = function(*own) if own[0] and BEFORE not in own[0] else own[-1]
        return {name: one(*(node[name] for node in nodes)) for name in parts} | rest

    layers = {name: one(*(tree[name] for tree in (state, *others))) for name in state if name != 'position'}
    return layers | {'position': (state, *others)[-1]['position']}


def prefill(
    model: LanguageModel,
    params: Any,
    state: State,
    tokens_BN: Array,
    length_B: Array,
    *,
    block: int | None = None,
    fresh: bool = False,
) -> tuple[Array, State]:
    """Reads prompts in parallel, `block` tokens of every row at a time, where it can in the kernels of training.

    Memory grows with the block and not with the prompt; but fresh prompts of a model that keeps all tokens are one
    block where training has kernels for them, up to 2^18 tokens in all.

    Args:
      model: a causal model.
      params: its parameters.
      state: from `init_state`, or of sequences to go on with.
      tokens_BN: prompts, padded on the right.
      length_B: int32, tokens of each prompt, 1..N (0 leaves the row's state alone; its logits say nothing).
      block: tokens at a time; None: what is fast.
      fresh: whether the state is that of `init_state`.

    Returns:
      The logits of the token after each prompt, [B, V] float32 (float64), and the new state.
    """
    config, (batch, n) = model.config, tokens_BN.shape
    attention = ARCHITECTURES[config.name].attention
    where = attention.whole_blocks(config, model.implementation.attention)
    last_BD = jnp.zeros((batch, config.model_dim), config.dtype)
    whole = where == 'chunk' or (where == 'sequence' and fresh and batch * n <= MOST_WHOLE_TOKENS)
    reader, tokens = 'training' if whole else 'reference', WHOLE_BLOCK_TOKENS
    if whole and where == 'sequence':
        # The rest is padding, for which there may be no relative bias.
        block = n = min(n, attention.longest_decoded(config) or n)
    elif whole:
        size = config.chunk_size
        if not fresh:
            # To the end of the chunk that is current.
            head_B = jnp.minimum(length_B, -state['position'] % size).astype(jnp.int32)
            last_BD, state = _read(model, params, state, last_BD, tokens_BN[:, :size], head_B)
            places_BN = jnp.minimum(head_B[:, None] + jnp.arange(n), n - 1)
            tokens_BN, length_B = jnp.take_along_axis(tokens_BN, places_BN, axis=1), length_B - head_B
        family, short = ARCHITECTURES[config.name].family, batch * -(-n // size) * size <= SHORT_PROMPT_TOKENS
        if family.decodes_in_kernels(config, attention, model.implementation) and not _scanned(model):
            reader = attention.reader_of_blocks(config, short=short, fresh=fresh and block is None)
            tokens = SHORT_PROMPT_TOKENS if reader == 'short' else tokens
        most = block or max(size, tokens // batch)
        # Blocks alike, of whole chunks.
        block = -(-n // -(-n // most))
        block = -(-block // size) * size
    block = block or min(PREFILL_BLOCK, n)
    blocks = -(-n // block)
    tokens_BN = jnp.pad(tokens_BN[:, :n], ((0, 0), (0, blocks * block - n)))
    tokens_GBT = tokens_BN.reshape(batch, blocks, block).swapaxes(0, 1)

    def read(carry, xs):
        last_BD, state = carry
        first, tokens_BT = xs
        here_B = jnp.clip(length_B - first, 0, block).astype(jnp.int32)
        return _read(model, params, state, last_BD, tokens_BT, here_B, reader=reader), None

    (last_BD, state), _ = jax.lax.scan(read, (last_BD, state), (jnp.arange(blocks) * block, tokens_GBT))
    return model.apply({'params': params}, last_BD[:, None], method='logits')[:, 0], state


def _scanned(model: LanguageModel) -> bool:
    return model.config.layer_stack == 'scan'


def _read(model, params, state, last_BD, tokens_BT, length_B, *, reader='reference') -> tuple[Array, State]:
    """Reads a block; returns what the output layer reads of each row's last token so far, and the new state."""
    h_BTD, state = extend(model, params, state, tokens_BT, length_B, reader=reader)
    own_BD = jnp.take_along_axis(h_BTD, jnp.maximum(length_B - 1, 0)[:, None, None], axis=1)[:, 0]
    return jnp.where(length_B[:, None] > 0, own_BD, last_BD), state


def with_capacity(model: LanguageModel, state: State, capacity: int) -> State:
    """Returns a state with room for so many tokens, of a model that keeps all tokens; other states as they are.

    Raises:
      UserError: see `check`.
    """
    check(model, capacity=capacity)
    if not what_keeps_all_tokens(model):
        return state
    attention = ARCHITECTURES[model.config.name].attention
    return _layer_states(lambda layer: attention.with_capacity(model.config, layer, capacity), state)


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
