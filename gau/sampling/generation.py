"""Text from a causal model: prefill of the prompt, then a jitted loop on the device decodes block after block.

The host sees the tokens once a block and turns them into text; nothing else travels between host and device.
"""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from gau.errors import UserError
from gau.models import decoding
from gau.sampling import rows

# Tokens drawn between two looks of the host: large enough to hide the call, small enough to read along.
BLOCK = 32


# Below, logits divided by it would overflow; above, all tokens are alike.
_TEMPERATURES = 1e-6, 1e6


class SamplingParams(NamedTuple):
    """How a token is drawn from the model's distribution.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token each time.
      top_k: only the k likeliest tokens may be drawn; 0 is no bound.
      top_p: only the likeliest tokens that together have this probability (and the one that reaches it); 1 is no bound.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


def check(sampling: SamplingParams, *, seed: int) -> None:
    """Raises UserError at a number that nothing can be drawn with."""
    least, most = _TEMPERATURES
    if sampling.temperature != 0 and not least <= sampling.temperature <= most:
        raise UserError(f'temperature={sampling.temperature} must be 0 (the likeliest token) or lie in {least}..{most}')
    if not 0 < sampling.top_p <= 1:
        raise UserError(f'top_p={sampling.top_p} is no probability above 0')
    if sampling.top_k < 0:
        raise UserError(f'top_k={sampling.top_k} must be positive, or 0 for no bound')
    if not 0 <= seed < 2**31:
        raise UserError(f'seed={seed} must lie in 0..{2**31 - 1}')


def drawn_logits(logits_BV: jax.Array, sampling: SamplingParams) -> jax.Array:
    """Returns the logits to draw from, [B, V]: divided by the temperature, -inf where top_k or top_p rule a token out.

    top_p looks at the probabilities that temperature and top_k leave. The likeliest token always stays.
    """
    logits_BV = logits_BV / (sampling.temperature or 1.0)
    if sampling.top_k:
        kth_B1 = jax.lax.top_k(logits_BV, min(sampling.top_k, logits_BV.shape[-1]))[0][:, -1:]
        logits_BV = jnp.where(logits_BV >= kth_B1, logits_BV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        p_BV = jax.nn.softmax(sorted_BV, axis=-1)
        # Kept: tokens before which less than top_p has been reached.
        kept_BV = jnp.cumsum(p_BV, axis=-1) - p_BV < sampling.top_p
        kept_BV = kept_BV.at[:, 0].set(True)
        least_B1 = jnp.min(jnp.where(kept_BV, sorted_BV, jnp.inf), axis=-1, keepdims=True)
        logits_BV = jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)
    return logits_BV


class Prefilled(NamedTuple):
    """What reading prompts leaves, for `decode` to continue from.

    Attributes:
      state: decoding state of B rows (`gau.models.decoding`).
      logits_BV: logits of the next token of each row.
    """

    state: Any
    logits_BV: jax.Array

    def repeated(self, model: nn.Module, times: int) -> 'Prefilled':
        """Returns each row `times` times; the copies of a row follow each other."""

        def repeat(x):
            # Always a copy: the loop overwrites what it is given.
            return x[jnp.arange(len(x) * times) // times]

        stacked = model.config.layer_stack == 'scan'
        return Prefilled(decoding.map_rows(repeat, self.state, stacked=stacked), repeat(self.logits_BV))


@functools.partial(jax.jit, static_argnums=0)
def _in_compute_type(model: nn.Module, params: Any):
    return decoding.in_compute_type(model, params)


def _whole_beside(params: Any) -> Sharding:
    """Returns how arrays lie that are whole on every device that has parameters."""
    sharding = jax.tree.leaves(params)[0].sharding
    return NamedSharding(sharding.mesh, PartitionSpec()) if isinstance(sharding, NamedSharding) else sharding


@functools.cache
def _prefill(model: nn.Module, fresh: bool, devices: int):
    """Returns the jitted `decoding.prefill` of a model, (params, state, tokens_BN, length_B) -> (logits_BV, state)."""
    function = rows.over_devices(
        functools.partial(decoding.prefill, model, fresh=fresh),
        model,
        devices,
        lies=(rows.WHOLE, rows.STATE, rows.FIRST, rows.FIRST),
        results=(rows.FIRST, rows.STATE),
    )
    return jax.jit(function, donate_argnums=1, compiler_options=dict(decoding.prefill_compiler_options(model)))


@functools.cache
def _draw_block(model: nn.Module, sampling: SamplingParams, block: int, devices: int):
    """Returns a jitted function (params, state, logits_BV, key_B, first) that draws and reads a block of tokens.

    It returns them, [block, B], with state and logits to go on from; `first` is the number of the first.
    """

    def draw_block(params, state, logits_BV, key_B, first):
        def draw(logits_BV, number):
            if not sampling.temperature:
                return jnp.argmax(logits_BV, axis=-1)
            # Every row has draws of its own, whatever the other rows are.
            keys_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, number)
            return jax.vmap(jax.random.categorical)(keys_B, drawn_logits(logits_BV, sampling))

        return decoding.decode(model, params, state, logits_BV, draw, first + jnp.arange(block))

    function = rows.over_devices(
        draw_block,
        model,
        devices,
        lies=(rows.WHOLE, rows.STATE, rows.FIRST, rows.FIRST, rows.WHOLE),
        results=(rows.SECOND, rows.STATE, rows.FIRST),
    )
    return jax.jit(function, donate_argnums=(1, 2))


def prefill(
    model: nn.Module,
    params: Any,
    prompts: Sequence[np.ndarray],
    *,
    max_tokens: int,
    start: Prefilled | None = None,
    devices: int = 1,
) -> Prefilled:
    """Reads prompts, all at once.

    Args:
      model: a causal LanguageModel.
      params: its parameters.
      prompts: int32 [n] tokens each, of any lengths, at least one (BOS); none are needed after a start.
      max_tokens: for how many more the state shall have room.
      start: what the prompts go on from, one row for each; or None.
      devices: over how many the prompts are spread; 1: as the parameters are.

    Raises:
      UserError: the model cannot be decoded, or not so far (see `decoding.check`); see `rows.check`.
    """
    rows.check(len(prompts), devices)
    longest = max(len(prompt) for prompt in prompts)
    if start is None:
        state = decoding.init_state(model, batch_size=len(prompts), capacity=longest + max_tokens)
    else:
        capacity = longest + max_tokens + int(start.state['position'].max())
        state = decoding.with_capacity(model, start.state, capacity)
        if not longest:
            # Where a program would leave it: else the loop was compiled a second time after its first block.
            return jax.device_put(start._replace(state=state), _whole_beside(params))
    # Few different shapes, so that prompts of other lengths find their program compiled.
    width = decoding.PREFILL_BLOCK
    width = 2 ** math.ceil(math.log2(longest)) if longest <= width else -(-longest // width) * width
    tokens_BN = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(tokens_BN, prompts, strict=True):
        row[: len(prompt)] = prompt
    length_B = np.array([len(prompt) for prompt in prompts], np.int32)
    place = functools.partial(rows.place, model=model, devices=devices)
    params, state = place(_in_compute_type(model, params), rows.WHOLE), place(state, rows.STATE)
    logits_BV, state = _prefill(model, start is None, devices)(params, state, tokens_BN, length_B)
    if start is not None:
        logits_BV = jnp.where(length_B[:, None] > 0, logits_BV, place(start.logits_BV, rows.FIRST))
    return Prefilled(state, logits_BV)


def decode(
    model: nn.Module,
    params: Any,
    prefilled: Prefilled,
    *,
    max_tokens: int,
    sampling: SamplingParams,
    seed: int,
    block: int = BLOCK,
    first_row: int = 0,
    devices: int = 1,
) -> Iterator[np.ndarray]:
    """Continues sequences, all at once, without an end of its own: the caller stops at what it takes for the end.

    Row b draws with the key (seed, b): it is the same text alone and beside others, up to rounding.

    Args:
      model: a causal LanguageModel.
      params: its parameters.
      prefilled: from `prefill`; its arrays are used up.
      max_tokens: tokens to add.
      sampling: how tokens are drawn.
      seed: of the draws.
      block: tokens drawn between two results.
      first_row: number b of the first row.
      devices: over how many the rows are spread; 1: as the parameters are.

    Yields:
      int32 [B, block], the next tokens (fewer in the last block).

    Raises:
      UserError: see `check` and `rows.check`.
    """
    check(sampling, seed=seed)
    rows.check(len(prefilled.logits_BV), devices)
    place = functools.partial(rows.place, model=model, devices=devices)
    params, state = place(_in_compute_type(model, params), rows.WHOLE), place(prefilled.state, rows.STATE)
    logits_BV = place(prefilled.logits_BV, rows.FIRST)
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), first_row + jnp.arange(len(logits_BV)))
    draw_block = _draw_block(model, sampling, block, devices)
    for first in range(0, max_tokens, block):
        # Always whole blocks, so that one program serves; what is drawn past the end (and past the capacity) is cut.
        tokens_NB, state, logits_BV = draw_block(params, state, logits_BV, key_B, first)
        yield np.asarray(tokens_NB).T[:, : max_tokens - first]


def generate(
    model: nn.Module, params: Any, prompts: Sequence[np.ndarray], *, max_tokens: int, **fields: Any
) -> Iterator[np.ndarray]:
    """Reads prompts with `prefill` and continues them with `decode`, which has the fields."""
    check(fields['sampling'], seed=fields['seed'])
    prefilled = prefill(model, params, prompts, max_tokens=max_tokens)
    yield from decode(model, params, prefilled, max_tokens=max_tokens, **fields)


def sample(
    model: nn.Module,
    params: Any,
    prompt: np.ndarray,
    *,
    bos_id: int,
    max_tokens: int,
    temperature: float,
    seed: int,
    num: int = 1,
) -> np.ndarray:
    """Continues a prompt `num` times; see `decode` for the rest.

    Args:
      model: a causal LanguageModel.
      params: its parameters.
      prompt: int32 [n] tokens, without BOS; may be empty.
      bos_id: token that every document starts with.
      max_tokens: tokens to add.
      temperature: 0 takes the likeliest token each time.
      seed: of the draws.
      num: continuations, independent of each other.

    Returns:
      int32 [num, max_tokens].
    """
    prompt = np.concatenate([[bos_id], prompt]).astype(np.int32)
    prefilled = prefill(model, params, [prompt], max_tokens=max_tokens).repeated(model, num)
    fields = {'max_tokens': max_tokens, 'sampling': SamplingParams(temperature), 'seed': seed}
    blocks = decode(model, params, prefilled, **fields)
    return np.concatenate(list(blocks), axis=1)
