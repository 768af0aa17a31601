"""Token by token against all at once: what the tests of decoding share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gau.models import decoding
from tests.models import tiny

N, BLOCK = tiny.CONTEXT, 7


def functions(model, block=BLOCK):
    prefill = functools.partial(decoding.prefill, model, block=block)
    return tiny.compile_fast(prefill), tiny.compile_fast(functools.partial(decoding.step, model))


def through_files(state, folder):
    """The decoding state saved and loaded again."""
    leaves, tree = jax.tree.flatten(state)
    for i, leaf in enumerate(leaves):
        np.save(folder / f'{i}.npy', np.asarray(leaf).view(np.uint8 if leaf.dtype == jnp.bfloat16 else leaf.dtype))
    loaded = [np.load(folder / f'{i}.npy').view(leaf.dtype) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(tree, [jnp.asarray(x) for x in loaded])


def staircase(model, params, *, block=BLOCK, folder=None):
    """Largest difference between decoding and the full forward, for the prompts of 1, 2, ... N tokens in one batch, and
    the largest logit.

    Each row has a text of its own. Prompts are read in blocks that do not fit the chunks of 5; then every row steps to
    the end of its text. With `folder` the state after the prompts is saved there, in mid-chunk for most rows, and what
    goes on from it must do so bitwise alike.
    """
    tokens_BN = tiny.tokens(N, N)
    full_BNV = np.asarray(tiny.apply(model, params, tokens_BN), np.float64)
    length_B = jnp.arange(1, N + 1)
    # What stands behind a prompt must not matter.
    prompts_BN = jnp.where(jnp.arange(N) < length_B[:, None], tokens_BN, 7)
    prefill, step = functions(model, block)
    rows = np.arange(N)
    loaded = None
    logits_BV, state = prefill(params, decoding.init_state(model, batch_size=N, capacity=N), prompts_BN, length_B)
    if folder:
        loaded = through_files(state, folder)
    worst = 0.0
    while True:
        position_B = np.asarray(state['position'])
        here = position_B <= N
        difference = np.asarray(logits_BV, np.float64)[here] - full_BNV[rows, np.minimum(position_B, N) - 1][here]
        worst = max(worst, np.abs(difference).max())
        if not (position_B < N).any():
            return worst, np.abs(full_BNV).max()
        # Rows at the end of their text go on with anything, past the capacity too, and are not looked at.
        next_B = tokens_BN[rows, np.minimum(position_B, N - 1)]
        logits_BV, state = step(params, state, next_B)
        if folder:
            again_BV, loaded = step(params, loaded, next_B)
            jax.tree.map(np.testing.assert_array_equal, (logits_BV, state), (again_BV, loaded))
