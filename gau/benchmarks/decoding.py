"""How fast models read and write, and how large their state is, against the tokens they look back on.

Parameters and states are random: what a token costs does not depend on what it says (but zeros compute faster).
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gau.benchmarks import kernel_trace
from gau.benchmarks.cells import Cell
from gau.errors import UserError
from gau.models import decoding, registry
from gau.models.language_model import LanguageModel

Result = dict[str, Any]

# Of the device's memory, for the state: parameters and one step's arrays want the rest.
STATE_SHARE = 0.75
# Tokens written for one sample; at least so many samples, and more while they take less than so many seconds.
STEPS = {'full': 64, 'quick': 16}
SAMPLES = {'full': (7, 25), 'quick': (3, 3)}
SECONDS = 1.0
# Copies of an array in one sample of the rate of memory.
COPIES = 10
# As large as parameters are at the start, so that activations stay finite.
PARAMETER_SCALE = 0.02


def measure_decode(cell: Cell, result: Result) -> None:
    """Puts the times of decoding tokens one by one, each looking back on `context`, and the state's size into `result`.

    Raises:
      UserError: the model cannot decode, or its state does not fit.
    """
    steps = STEPS[cell.effort]
    model, params = _model(cell, result)
    result['tokens'] = cell.batch_size * steps
    position = max(cell.context - steps, 0)
    result['bytes_per_step'] = bytes_per_step(model, params, batch_size=cell.batch_size, first=position, steps=steps)
    write = _jitted(_write, model, steps)
    # The last token written is the one that looks back on the whole context.
    _measure(cell, model, functools.partial(write, params), result, position=position)


def measure_prefill(cell: Cell, result: Result) -> None:
    """Puts the times of the prefill of `context` tokens, and the state's size, into `result`.

    Raises:
      UserError: the model cannot decode, or its state does not fit.
    """
    model, params = _model(cell, result)
    tokens_BN = jax.random.randint(jax.random.key(1), (cell.batch_size, cell.context), 0, cell.vocab_size)
    read = _jitted(_prefill, model, options=decoding.prefill_compiler_options(model))
    result['tokens'] = tokens_BN.size
    _measure(cell, model, lambda state: read(params, state, tokens_BN), result, position=0)


def bytes_per_step(model: LanguageModel, params: Any, *, batch_size: int, first: int, steps: int) -> float:
    """Returns the bytes that a step cannot do without, the mean of `steps` from position `first` on.

    All parameters once, in the types that they are held in; of every row the keys and values that its token looks back
    on, and what is summed up, once in the compute type.
    """
    state = jax.eval_shape(functools.partial(decoding.init_state, model, batch_size=batch_size, capacity=first + steps))
    size = model.config.get('chunk_size') or first + steps
    before = size * ((model.config.get('local_window') or 1) - 1)
    seen = sum(min(before, p // size * size) + p % size + 1 for p in range(first, first + steps)) / steps
    far = size * (model.config.get('far_chunks') or 0)
    total = float(sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params)))
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if path[-1].key in ('k', 'v'):
            total += leaf.size * leaf.dtype.itemsize * seen / leaf.shape[-2]
        elif path[-1].key in ('far_k', 'far_v'):
            read = sum(min(far, p // size * size) for p in range(first, first + steps)) / steps
            total += leaf.size * leaf.dtype.itemsize * read / leaf.shape[-2]
        elif path[-1].key == 'sum':
            total += leaf.size * jnp.dtype(model.config.dtype).itemsize
    return total


def measure_memory(cell: Cell, result: Result) -> None:
    """Puts the times of reading and writing an array of `context` MiB into `result`."""
    x = _random(jax.ShapeDtypeStruct((cell.context * 2**18,), 'float32'))
    add = jax.jit(lambda x: x + 1, donate_argnums=0)
    seconds = []
    for sample in range(SAMPLES[cell.effort][0] + 1):
        jax.block_until_ready(x)
        started = time.perf_counter()
        for _ in range(COPIES):
            x = add(x)
        jax.block_until_ready(x)
        if sample:  # The first waits for the compiler.
            seconds.append((time.perf_counter() - started) / COPIES)
    result.update(seconds=seconds, bytes=2 * x.nbytes)


def _model(cell: Cell, result: Result) -> tuple[LanguageModel, Any]:
    model = registry.build(cell.model_config(), vocab_size=cell.vocab_size, causal=cell.causal)
    params = _params(model)
    result['parameters'] = sum(leaf.size for leaf in jax.tree.leaves(params))
    return model, params


@functools.cache
def _params(model: LanguageModel) -> Any:
    """Returns random parameters; to compile their initialisers would take longer than all that is measured."""

    def init():
        params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
        return decoding.in_compute_type(model, nn.unbox(params))

    return jax.tree.map(lambda leaf: PARAMETER_SCALE * _random(leaf), jax.eval_shape(init))


@functools.cache
def _jitted(function: Callable, model: LanguageModel, *static: int, options: tuple = ()) -> Callable:
    """Returns the same program for all contexts, which a model with a state of constant size compiles once."""
    run = functools.partial(function, model, *static)
    return jax.jit(run, donate_argnums=1, compiler_options=dict(options))


def _measure(cell: Cell, model: LanguageModel, run: Any, result: Result, *, position: int) -> None:
    """Times `run(state) -> state`, from states at `position`; with `cell.profile` tells its kernels."""
    make = functools.partial(decoding.init_state, model, batch_size=cell.batch_size, capacity=cell.context)
    abstract = jax.eval_shape(make)
    result['state_bytes'] = needed = decoding.state_bytes(abstract)
    memory = (jax.devices()[0].memory_stats() or {}).get('bytes_limit')
    if memory and needed > STATE_SHARE * memory:
        raise UserError(f'out of memory: {needed / 2**30:.0f} GiB of state')
    state = jax.tree.map(_random, abstract)
    seconds, launch_seconds = [], []
    least, most = SAMPLES[cell.effort]
    for sample in range(most + 1):
        if len(seconds) >= least and sum(seconds) > SECONDS:
            break
        state['position'] = jnp.full_like(state['position'], position)
        jax.block_until_ready(state)
        started = time.perf_counter()
        state = run(state)
        launched = time.perf_counter()
        jax.block_until_ready(state)
        if sample:  # The first waits for the compiler.
            seconds.append(time.perf_counter() - started)
            launch_seconds.append(launched - started)
    result |= {'seconds': seconds, 'launch_seconds': launch_seconds}
    if cell.profile:
        state['position'] = jnp.full_like(state['position'], position)
        steps = STEPS[cell.effort] if cell.benchmark == 'decode' else 1
        result['profile'] = kernel_trace.profile(lambda: run(state), steps=steps)


def _random(leaf: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(leaf.dtype, jnp.integer):
        # Of chunks that are read no two are the same; positions are set by who measures.
        return jnp.broadcast_to(jnp.arange(leaf.shape[-1], dtype=leaf.dtype), leaf.shape)
    return _normal(jax.random.key(0), leaf.shape, leaf.dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key, shape, dtype):
    return jax.random.normal(key, shape, dtype)


def _write(model, steps, params, state):
    """Writes `steps` tokens, each the likeliest, in one loop on the device."""
    batch = len(state['position'])
    logits_BV = jnp.zeros((batch, model.vocab_size), jnp.promote_types(model.config.dtype, jnp.float32))

    def likeliest(logits_BV, _):
        return jnp.argmax(logits_BV, axis=-1)

    return decoding.decode(model, params, state, logits_BV, likeliest, jnp.arange(steps))[1]


def _prefill(model, params, state, tokens_BN):
    length_B = jnp.full(tokens_BN.shape[0], tokens_BN.shape[1], jnp.int32)
    return decoding.prefill(model, params, state, tokens_BN, length_B, fresh=True)[1]
