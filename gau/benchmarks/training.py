"""Training steps and forward passes of our models, and the matrix rate of the chip, measured in this process.

Tokens are random and lie on the device already: no data is loaded. The training step is the one that train.py runs,
built by the same `gau.training.setup.Run`: forward and backward pass, clipping, AdamW, float32 parameters.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gau.benchmarks import kernel_trace
from gau.benchmarks.cells import Cell
from gau.benchmarks.timing import SAMPLES, Times, time_steps
from gau.errors import UserError
from gau.training import config as training_config
from gau.training import mesh as meshes
from gau.training import step
from gau.training.batches import put_batch
from gau.training.setup import Run

Result = dict[str, Any]

# Different batches that the steps go through in turn.
BATCHES = 4
# Of the documents in packed batches; their lengths are geometric.
MEAN_DOCUMENT = 600
MASK_RATE = 0.15
# Matmuls in one sample of the matrix rate.
MATMULS = 10


def measure_train(cell: Cell, result: Result) -> None:
    """Puts times, memory and compile time of the full training step into `result`, each as soon as it is known.

    Also the loss and the size of the gradient in the first step: how two ways of computing the same may be compared.

    Raises:
      UserError: a combination that the model or the loop refuses, or a loss that is not finite.
    """
    run = _run(cell, result)
    state = run.init_state()
    with run.context():
        batches = _batches(cell, run)
        compiled = _compile(run.train_step(), state, batches[0], result=result)
        batch, metrics, first = itertools.cycle(batches), {}, {}

        def launch() -> jax.Array:
            nonlocal state, metrics
            state, metrics = compiled(state, next(batch))
            first.update({f'first_{name}': metrics[name] for name in ('loss', 'grad_norm')} if not first else {})
            return metrics['loss']

        times = time_steps(launch, jax.block_until_ready, effort=cell.effort)
        result.update({name: float(x) for name, x in first.items()})
        _finish(times, float(metrics['loss']), result)
        if cell.profile:
            result['profile'] = kernel_trace.profile(launch, steps=1)


def measure_forward(cell: Cell, result: Result) -> None:
    """Puts the same of the losses of all tokens without a gradient into `result`, as evaluation computes them.

    Raises:
      UserError: a combination that the model refuses, or a loss that is not finite.
    """
    run = _run(cell, result)
    params = run.init_params()
    with run.context():
        batches = _batches(cell, run)
        losses = jax.jit(functools.partial(run.objective.token_losses, run.model))
        compiled = _compile(losses, params, batches[0], result=result)
        batch, nll_BN = itertools.cycle(batches), None

        def launch() -> jax.Array:
            nonlocal nll_BN
            nll_BN = compiled(params, next(batch))
            return nll_BN

        times = time_steps(launch, jax.block_until_ready, effort=cell.effort)
        _finish(times, float(jnp.mean(nll_BN)), result)
        if cell.profile:
            result['profile'] = kernel_trace.profile(launch, steps=1)


def measure_matmul(cell: Cell, result: Result) -> None:
    """Puts the times of one matmul of two square matrices with edges of `context` into `result`.

    The numbers are random, since zeros take less power and so let the chip run faster than it can.
    """
    n = cell.context
    draw = jax.jit(functools.partial(jax.random.normal, shape=(n, n), dtype=cell.dtype))
    a, b = draw(jax.random.key(0)), draw(jax.random.key(1))
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for sample in range(SAMPLES[cell.effort][0] + 2):
        jax.block_until_ready([a, b])
        started = time.perf_counter()
        for _ in range(MATMULS):
            c = multiply(a, b)
        jax.block_until_ready(c)
        if sample > 1:  # The first waits for the compiler.
            seconds.append((time.perf_counter() - started) / MATMULS)
    result.update(seconds=seconds, flops=2 * n**3)


def _run(cell: Cell, result: Result) -> Run:
    config = training_config.default_config()
    config.objective = cell.objective
    config.data.context, config.data.batch_size = cell.context, cell.batch_size
    config.optimizer.name = cell.optimizer
    config.optimizer.accumulation_steps = cell.spec.accumulation_steps
    if cell.spec.segment_tokens:
        config.optimizer.segment_tokens = cell.spec.segment_tokens
        config.data.attend_across_documents = not cell.packed
    config.model = cell.model_config()
    run = Run.from_config(training_config.resolve(config), devices=jax.devices()[:1])
    # Not the vocabulary of the default tokenizer.
    model = run.model.clone(vocab_size=cell.vocab_size)
    run = dataclasses.replace(run, model=model, tokenizer=SimpleNamespace(vocab_size=cell.vocab_size))
    result.update(
        tokens=cell.batch_size * cell.context,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.abstract_params)),
        flops_per_token=run.flops_per_token,
        impl_chosen=model.implementation.attention,
    )
    return run


def _batches(cell: Cell, run: Run) -> list[step.Batch]:
    sharding = meshes.batch_sharding(run.mesh)
    return [put_batch(random_batch(cell, seed), sharding) for seed in range(BATCHES)]


def random_batch(cell: Cell, seed: int) -> dict[str, np.ndarray]:
    """Returns what the data pipeline yields, with random tokens: `inputs`, `targets` int32 and `weights` float32.

    Packed: `segment_ids` from 1 and `positions`, both int32, of documents of geometric length end to end. Of 'halves':
    those of a source and a target without padding, of which the target alone counts.
    """
    rng, shape = np.random.default_rng(seed), (cell.batch_size, cell.context)
    batch = {name: rng.integers(cell.vocab_size, size=shape, dtype=np.int32) for name in ('inputs', 'targets')}
    batch['weights'] = np.ones(shape, np.float32)
    if cell.objective == 'mlm':
        batch['weights'] = (rng.random(shape) < MASK_RATE).astype(np.float32)
    if cell.objective == 'halves':
        places = np.broadcast_to(np.arange(cell.context, dtype=np.int32), shape)
        batch['segment_ids'] = 1 + places // (cell.context // 2)
        batch['positions'] = places % (cell.context // 2)
        batch['weights'] = (batch['segment_ids'] == 2).astype(np.float32)
    if cell.packed:
        begins = rng.random(shape) < 1 / MEAN_DOCUMENT
        begins[:, 0] = True
        places = np.arange(cell.context, dtype=np.int32)
        batch['segment_ids'] = np.cumsum(begins, axis=1, dtype=np.int32)
        batch['positions'] = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return batch


def _compile(function: Callable, *arguments: Any, result: Result) -> Callable:
    """Compiles for these arguments; `result` gets seconds, whether a cache had it, and the memory it plans for."""
    events: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
    started = time.perf_counter()
    lowered = function.lower(*arguments)
    traced, events[:] = time.perf_counter(), []
    compiled = lowered.compile()
    result.update(
        trace_seconds=traced - started,
        compile_seconds=time.perf_counter() - traced,
        compile_cached='/jax/compilation_cache/cache_hits' in events,
    )
    memory = compiled.memory_analysis()
    if memory is not None:
        planned = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
        result['compiler_bytes'] = planned + memory.temp_size_in_bytes
    return compiled


def _finish(times: Times, loss: float, result: Result) -> None:
    if not math.isfinite(loss):
        raise UserError(f'the loss is {loss} after {len(times.seconds)} steps: their times would mean nothing')
    result.update(times._asdict(), loss=loss)
    result['peak_bytes'] = (jax.devices()[0].memory_stats() or {}).get('peak_bytes_in_use')
