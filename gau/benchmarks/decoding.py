"""How fast models read and write, and how large their state is, against the tokens they look back on.

Parameters and states are random: what a token costs does not depend on what it says (but zeros compute faster).
"""

import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gau.models import decoding, registry
from gau.models.config import default_config, resolve
from gau.models.language_model import LanguageModel

Row = dict[str, Any]

# Of the device's memory, for the state: parameters and one step's arrays want the rest.
STATE_SHARE = 0.75


class Plan(NamedTuple):
    """What is measured.

    Attributes:
      models: names of the registry.
      size: of all of them.
      dtype: compute type.
      contexts: tokens that a token looks back on (decode), or of the prompt (prefill).
      batch_sizes: texts side by side (prefill: 1).
      steps: tokens written for one measurement.
      repeats: measurements, of which the median counts.
      vocab_size: V.
      block: tokens read at once in prefill.
    """

    models: Sequence[str]
    size: str = 'base'
    dtype: str = 'bfloat16'
    contexts: Sequence[int] = (1024, 4096, 16384, 65536, 131072)
    batch_sizes: Sequence[int] = (1, 64)
    steps: int = 64
    repeats: int = 5
    vocab_size: int = 32_000
    block: int = 2048


def decode_rows(plan: Plan) -> Iterator[Row]:
    """Yields latency and tokens/s of writing, with the size of the state, for every model, batch and context."""
    for name in plan.models:
        model, params = _model(plan, name)
        write = jax.jit(functools.partial(_write, model, plan.steps), donate_argnums=1)
        for batch_size in plan.batch_sizes:
            for context in plan.contexts:
                abstract = jax.eval_shape(
                    functools.partial(decoding.init_state, model, batch_size=batch_size, capacity=context)
                )
                row = _row('decode', plan, model, params, context) | {
                    'batch_size': batch_size,
                    'state_bytes': decoding.state_bytes(abstract),
                }
                yield row | _measured(
                    abstract,
                    lambda state, write=write, params=params: write(params, state),
                    # The last token written is the one that looks back on the whole context.
                    position=max(context - plan.steps, 0),
                    repeats=plan.repeats,
                    tokens=plan.steps,
                    per_second=batch_size * plan.steps,
                )


def prefill_rows(plan: Plan) -> Iterator[Row]:
    """Yields tokens/s of reading a prompt of every context, batch 1."""
    for name in plan.models:
        model, params = _model(plan, name)
        for context in plan.contexts:
            abstract = jax.eval_shape(functools.partial(decoding.init_state, model, batch_size=1, capacity=context))
            tokens_BN = jax.random.randint(jax.random.key(1), (1, context), 0, plan.vocab_size)
            read = jax.jit(functools.partial(_prefill, model, plan.block), donate_argnums=1)
            row = _row('prefill', plan, model, params, context) | {
                'batch_size': 1,
                'state_bytes': decoding.state_bytes(abstract),
                'block': plan.block,
            }
            yield row | _measured(
                abstract,
                lambda state, read=read, params=params, tokens_BN=tokens_BN: read(params, state, tokens_BN),
                position=0,
                repeats=min(plan.repeats, 2),
                tokens=context,
                per_second=context,
            )


KINDS: dict[str, Callable[[Plan], Iterator[Row]]] = {'decode': decode_rows, 'prefill': prefill_rows}


def _model(plan: Plan, name: str) -> tuple[LanguageModel, Any]:
    config = default_config()
    config.name, config.size, config.dtype = name, plan.size, plan.dtype
    model = registry.build(
        resolve(config, objective='lm', context=max(plan.contexts)), vocab_size=plan.vocab_size, causal=True
    )
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 2), jnp.int32))['params'])
    return model, nn.unbox(init(jax.random.key(0)))


def _row(kind: str, plan: Plan, model: LanguageModel, params: Any, context: int) -> Row:
    return {
        'benchmark': kind,
        'model': model.config.name,
        'size': plan.size,
        'dtype': plan.dtype,
        'parameters': sum(x.size for x in jax.tree.leaves(params)),
        'context': context,
    }


def _measured(abstract, run, *, position: int, repeats: int, tokens: int, per_second: int) -> Row:
    """Returns the timings of `run(state) -> state`, or why there are none."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get('bytes_limit')
    needed = decoding.state_bytes(abstract)
    if memory and needed > STATE_SHARE * memory:
        return {'error': f'out of memory: {needed / 2**30:.0f} GiB of state'}
    try:
        state = _random_state(abstract)
        seconds = []
        for repeat in range(repeats + 1):
            state['position'] = jnp.full_like(state['position'], position)
            jax.block_until_ready(state)
            started = time.perf_counter()
            state = run(state)
            jax.block_until_ready(state)
            if repeat:  # The first waits for the compiler.
                seconds.append(time.perf_counter() - started)
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return {'error': 'out of memory'}
    median = statistics.median(seconds)
    return {
        'ms_per_token': 1000 * median / tokens,
        'ms_per_token_min': 1000 * min(seconds) / tokens,
        'ms_per_token_max': 1000 * max(seconds) / tokens,
        'tokens_per_second': per_second / median,
        'repeats': len(seconds),
    }


def _random_state(abstract):
    def draw(number, leaf):
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jax.jit(jax.random.normal, static_argnums=(1, 2))(jax.random.key(number), leaf.shape, leaf.dtype)

    leaves, tree = jax.tree.flatten(abstract)
    return jax.tree.unflatten(tree, [draw(number, leaf) for number, leaf in enumerate(leaves)])


def _write(model, steps, params, state):
    """Writes `steps` tokens, each the likeliest, in one loop on the device."""
    tokens_B = jnp.zeros_like(state['position'])

    def body(carry, _):
        state, tokens_B = carry
        logits_BV, state = decoding.step(model, params, state, tokens_B)
        return (state, jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)), None

    return jax.lax.scan(body, (state, tokens_B), None, length=steps)[0][0]


def _prefill(model, block, params, state, tokens_BN):
    length_B = jnp.full(tokens_BN.shape[0], tokens_BN.shape[1], jnp.int32)
    return decoding.prefill(model, params, state, tokens_BN, length_B, block=block)[1]
