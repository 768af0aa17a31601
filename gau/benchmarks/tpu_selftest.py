"""What the first person with a TPU runs: kernels against the reference, and training with and without them."""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from gau.benchmarks.meshes import Steps, train_over
from gau.ops import gated_mixed_chunk as flash_reference
from gau.ops.kernels import pallas, tpu_quadratic
from gau.ops.kernels.gated_mixed_chunk import gated_mixed_chunk
from gau.ops.kernels.splash_attention import splash_attention
from gau.ops.mixed_chunk_attention import ChunkSpec
from gau.ops.quadratic_attention import quadratic_attention
from gau.ops.scores import Scoring
from gau.training.config import resolve

# Largest error, of the largest number, with which a kernel is right. A TPU has float32 products in several passes.
TOLERANCE = {'float32': 1e-3, 'bfloat16': 3e-2}
# How far the losses of two runs that differ in rounding alone may be apart, in nats.
CURVES_TOLERANCE = 0.1
MODELS = {'flash': 'pallas', 'flash_quad': 'pallas', 'transformer_plus_plus': 'splash'}


class Sizes(NamedTuple):
    """How large everything is: of a chip, and tiny for the interpreter on a CPU."""

    batch: int
    tokens: int
    chunk: int
    key: int
    expanded: int
    heads: int
    head: int
    steps: int
    argument: str


CHIP = Sizes(2, 1536, 256, 128, 1536, 4, 64, 100, 'size=small,context=1024,data=embedded')
TINY = Sizes(2, 40, 16, 8, 16, 1, 64, 4, 'runlocal,context=64')


class Check(NamedTuple):
    """A kernel against its reference.

    Attributes:
      name: of the case.
      dtype: of its arrays.
      value: largest error of the result, over its largest number.
      gradient: the same of all gradients.
    """

    name: str
    dtype: str
    value: float
    gradient: float

    @property
    def right(self) -> bool:
        """Whether both errors are those of rounding."""
        return max(self.value, self.gradient) < TOLERANCE[self.dtype]


def check_kernels(sizes: Sizes) -> Iterator[Check]:
    """Yields every kernel, causal and not, with documents and padding, against the reference on the same device."""
    for causal in (True, False):
        seen = 'causal' if causal else 'bidirectional'
        cases = {'splash': _splash(sizes, causal)}
        cases['flash_quad'] = _flash_quad(sizes, causal)
        for function in ('relu2', 'softmax'):
            cases[f'flash, {function}'] = _flash(sizes, causal, function)
        if causal:
            cases['flash, decay_gate'] = _flash(sizes, causal, 'relu2', gated=True)
            cases['flash, local_window'] = _flash(sizes, causal, 'relu2', window=2)
        for name, (kernel, reference, arrays) in cases.items():
            ops = [_with_gradients(op, _documents(sizes)) for op in (kernel, reference)]
            for dtype in TOLERANCE:
                yield Check(f'{name}, {seen}', dtype, *_errors(*ops, arrays, dtype))


def curves(sizes: Sizes, get_config: Callable[[str], ConfigDict]) -> Iterator[tuple[str, Steps, Steps]]:
    """Yields, for each model that has kernels, its name and a short training run by XLA and one by the kernels.

    Args:
      sizes: of the models.
      get_config: of a config program for language modelling.
    """
    shape = (jax.device_count(), 1, 1, 1)
    for model, kernel in MODELS.items():
        runs = []
        for impl in ('xla', kernel):
            config = get_config(f'model={model},{sizes.argument}')
            config.model.impl = impl
            config.data.batch_size = 8 * jax.device_count()
            if sizes is TINY:
                config.model.update({'dtype': 'float32', 'num_layers': 1, 'model_dim': 64})
            runs += train_over(resolve(config), [shape], steps=sizes.steps)
        yield model, *runs


def _with_gradients(op: Callable, ids: Array) -> Callable:
    """Returns, compiled, what returns the result of an op and its gradients for all arrays."""

    def loss(arrays):
        y = op(*arrays, segment_ids_BN=ids)
        return jnp.sum(y.astype(jnp.float32) ** 2), y

    gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(arrays: list[Array]) -> tuple[Array, list[Array]]:
        (_, y), grads = gradients(arrays)
        return y, grads

    return run


def _errors(kernel: Callable, reference: Callable, arrays: list[Array], dtype: str) -> tuple[float, float]:
    rounded = [x.astype(dtype) for x in arrays]
    found = kernel(rounded)
    with jax.default_matmul_precision('highest'):
        wanted = reference([x.astype('float32') for x in rounded])
    return tuple(
        max(
            float(np.abs(np.asarray(x, np.float32) - np.asarray(y)).max() / np.abs(y).max())
            for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        )
        for a, b in zip(found, wanted, strict=True)
    )


def _documents(sizes: Sizes) -> Array:
    """Ids of documents that end in the middle of a chunk, with padding at the end; and of one over all chunks."""
    token = np.arange(sizes.tokens)
    packed = 1 + token // (sizes.tokens // 3 - 5)
    ends = token < sizes.tokens - 5
    return jnp.asarray(np.stack([np.where(ends, packed, 0), np.where(ends, 1, 2)]), jnp.int32)


def _draw(*shapes: tuple[int, ...]) -> list[Array]:
    generator = np.random.default_rng(0)
    return [jnp.asarray(generator.standard_normal(shape), jnp.float32) for shape in shapes]


def _splash(sizes: Sizes, causal: bool) -> tuple[Callable, Callable, list[Array]]:
    arrays = _draw(*[(sizes.batch, sizes.heads, sizes.tokens, sizes.head)] * 3)

    def reference(q, k, v, segment_ids_BN):
        fields = {'scoring': Scoring('softmax', None), 'causal': causal, 'segment_ids_BN': segment_ids_BN}
        return jax.vmap(functools.partial(quadratic_attention, **fields), 1, 1)(q, k, v)

    kernel = functools.partial(splash_attention, causal=causal, interpret=pallas.interpreted())
    return kernel, reference, arrays


def _flash_quad(sizes: Sizes, causal: bool) -> tuple[Callable, Callable, list[Array]]:
    by_token = (sizes.batch, sizes.tokens)
    shapes = [*[(*by_token, sizes.key)] * 2, (*by_token, sizes.expanded), (2 * sizes.tokens - 1,)]
    fields = {'scoring': Scoring('relu2', 'fixed', 16), 'causal': causal}

    def op(of, *arrays, segment_ids_BN):
        *operands, bias_P = arrays
        return of(*operands, **fields, segment_ids_BN=segment_ids_BN, bias_P=bias_P)

    kernel, reference = tpu_quadratic.quadratic_attention, functools.partial(quadratic_attention, impl='reference')
    return functools.partial(op, kernel), functools.partial(op, reference), _draw(*shapes)


def _flash(
    sizes: Sizes, causal: bool, function: str, *, gated: bool = False, window: int = 1
) -> tuple[Callable, Callable, list[Array]]:
    by_token = (sizes.batch, sizes.tokens)
    shapes = [(*by_token, 2 * sizes.expanded), (2, sizes.expanded), *[(*by_token, sizes.key)] * 4]
    arrays = _draw(*shapes, (2 * sizes.chunk - 1,), *([(*by_token, 1)] if gated else []))
    scoring = Scoring(function, None) if function == 'softmax' else Scoring(function, 'fixed', 16)
    spec = ChunkSpec(sizes.chunk // window, scoring, causal, window=window)

    def op(of, *arrays, segment_ids_BN):
        operands, (bias_P, *gate) = list(arrays[:6]), arrays[6:]
        # Rows at padding mean nothing, in the gradients of p too: nothing there, nothing to compare.
        operands[0] = jnp.where((segment_ids_BN > 0)[..., None], operands[0], 0)
        gate_BN1 = gate[0].astype(jnp.float32) if gate else None
        return of(*operands, spec=spec, segment_ids_BN=segment_ids_BN, bias_P=bias_P, gate_BN1=gate_BN1)

    kernel = functools.partial(op, functools.partial(gated_mixed_chunk, kernels='pallas'))
    return kernel, functools.partial(op, flash_reference.gated_mixed_chunk), arrays
