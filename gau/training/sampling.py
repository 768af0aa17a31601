"""Text from a causal model: one jitted loop that draws a token, appends it and looks again."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=(0, 4))
def _continue(
    model: nn.Module, params: Any, tokens_BN: jax.Array, first: jax.Array, last: int, temperature: jax.Array, key: Any
) -> jax.Array:
    def body(n: jax.Array, tokens_BN: jax.Array) -> jax.Array:
        # What is not written yet is padding, which no token sees: every model gives what it would on the prefix alone.
        segment_ids_BN = jnp.broadcast_to((jnp.arange(tokens_BN.shape[1]) < n).astype(jnp.int32), tokens_BN.shape)
        logits_BNV = model.apply({'params': params}, tokens_BN, segment_ids_BN=segment_ids_BN)
        logits_BV = jax.lax.dynamic_index_in_dim(logits_BNV, n - 1, axis=1, keepdims=False)
        drawn_B = jax.random.categorical(jax.random.fold_in(key, n), logits_BV / jnp.maximum(temperature, 1e-6))
        chosen_B = jnp.where(temperature > 0, drawn_B, jnp.argmax(logits_BV, axis=-1))
        return jax.lax.dynamic_update_index_in_dim(tokens_BN, chosen_B.astype(tokens_BN.dtype), n, axis=1)

    return jax.lax.fori_loop(first, last, body, tokens_BN)


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
    """Continues a prompt; every token costs a forward pass over the whole text, so this is for short samples.

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
    start = np.concatenate([[bos_id], prompt]).astype(np.int32)
    tokens_BN = np.zeros((num, len(start) + max_tokens), np.int32)
    tokens_BN[:, : len(start)] = start
    key = jax.random.key(seed)
    filled = _continue(model, params, tokens_BN, len(start), tokens_BN.shape[1], jnp.float32(temperature), key)
    return np.asarray(filled)[:, len(start) :]
