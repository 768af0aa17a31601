"""Effective rank of a trained model's attention A, of A V and of U * (A V), layer by layer, on held-out sequences."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from ml_collections import ConfigDict

from gau import plots, strict_json
from gau.errors import UserError
from gau.evaluation.evaluator import Run, on_device
from gau.layers.core import AttentionCore
from gau.layers.gated_attention_unit import merge_heads
from gau.objectives.objective import Batch

# The matrices of a layer, [tokens, tokens] and twice [tokens, E].
RANKS = {
    'A': 'the attention between the tokens of a sequence, mean over heads',
    'AV': 'what attention reads, all heads side by side',
    'UAV': 'the same after the gate, if there is one: what the output layer reads',
}
# What else a line has that is shown.
_ABOUT = ('workdir', 'step', 'model', 'gate', 'tokens', 'width', 'layer', 'heads')
# Name of a layer's output projection. How far A V may be from what attention gave, over its size.
_OUT, _TOLERANCE = 'out', 1e-3


def readable(config: ConfigDict) -> ConfigDict:
    """Returns a run's config for `load_run`, in float32 and plain JAX: rounding would fill up every matrix.

    Raises:
      UserError: its layers cannot be looked into.
    """
    config = config.copy_and_resolve_references()
    if config.model.layer_stack != 'unrolled':
        raise UserError(f'model.layer_stack={config.model.layer_stack}: layers can be looked into with unrolled only')
    config.model.impl, config.model.dtype = 'xla', 'float32'
    return config


def ranks(run: Run, params: Any, *, split: str, sequences: int) -> tuple[dict[str, np.ndarray], int]:
    """Returns the effective ranks under the names of `RANKS`, [layers], means over sequences; and the width of A V.

    Args:
      run: opened with a config of `readable`.
      params: its parameters.
      split: of the data.
      sequences: rows of `data.context` tokens, the first ones.

    Raises:
      UserError: the split is shorter, or an attention that is not linear in its values, which has no matrix A.
    """
    rows = list(itertools.islice(_rows(run, split), sequences))
    if len(rows) < sequences:
        raise UserError(f'the split {split} has {len(rows)} whole sequences of the {sequences} asked for')
    measured, found = jax.jit(matrices(run.model)), []
    with run.context(), jax.default_matmul_precision('highest'):
        for batch in rows:
            layers = jax.device_get(measured(params, run.put_batch(batch)))
            for layer, (_, error) in enumerate(layers):
                if not error < _TOLERANCE:
                    raise UserError(f'layer {layer}: {run.config.model.name} is not linear in its values here: no A')
            found.append([{name: effective_rank(x) for name, x in own.items()} for own, _ in layers])
    means = {name: np.array([[layer[name] for layer in row] for row in found]).mean(0) for name in RANKS}
    return means, layers[0][0]['AV'].shape[-1]


def effective_rank(x: np.ndarray) -> float:
    """Returns exp(entropy) of the singular values over their sum: k for k equal ones; 0 for a matrix of zeros.

    This is the effective rank of Roy and Vetterli (2007).

    Args:
      x: [..., M, N]; over the first axes the mean is taken.
    """
    values = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    total = values.sum(-1, keepdims=True)
    p = values / np.where(total > 0, total, 1)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1)
    return float(np.mean(np.where(total[..., 0] > 0, np.exp(entropy), 0)))


def read(path: Path) -> list[dict[str, Any]]:
    """Returns the lines, one for each layer of a model, that `scripts/attention_ranks.py --json` wrote.

    Raises:
      UserError: it holds none.
    """
    try:
        lines = [strict_json.loads(line) for line in path.read_text().splitlines()]
        if not lines or any(not isinstance(line, dict) for line in lines):
            raise ValueError('want a JSON object for each layer')
        missing = {name for line in lines for name in (*_ABOUT, *RANKS) if name not in line}
        if missing:
            raise ValueError(f'a line has no {", ".join(sorted(missing))}')
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read as the ranks of layers: {error}') from error
    return lines


def plot(lines: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws each of `RANKS` over the layers, a curve for each model of such lines."""
    canvas, axes = plots.figure('', f'rank of {next(iter(RANKS))}', 'effective rank', rows=len(RANKS))
    panels = [axes]
    for number, name in enumerate(list(RANKS)[1:], 2):
        panels.append(canvas.add_subplot(len(RANKS), 1, number, ylabel=f'rank of {name}', sharex=axes))
        panels[-1].grid(alpha=0.3)
    panels[-1].set_xlabel('layer')
    # Ticks at layers, of which there are no halves.
    panels[-1].locator_params(axis='x', integer=True)
    for model in dict.fromkeys(line['workdir'] for line in lines):
        own = [line for line in lines if line['workdir'] == model]
        for panel, name in zip(panels, RANKS, strict=True):
            panel.plot([line['layer'] for line in own], [line[name] for line in own], marker='.', label=model)
    panels[0].legend(fontsize=8)
    plots.save(canvas, path)


def matrices(model: nn.Module) -> Callable[[Any, Mapping[str, Array]], list[tuple[dict[str, Array], Array]]]:
    """Returns (params, batch of one row) -> for every layer the matrices of `RANKS` and how far A V is from A times V.

    A is what the attention makes of the identity as values, so that no formula stands here a second time.
    """

    def measure(params: Any, batch: Mapping[str, Array]) -> list[tuple[dict[str, Array], Array]]:
        seen: dict[tuple[str, ...], tuple[dict[str, Array], Array]] = {}

        def look(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
            result, path = call(*args, **kwargs), context.module.path
            if context.method_name != '__call__':
                return result
            if isinstance(context.module, AttentionCore):
                queries_keys, v_BHNE, *rest = args
                one_BHNN = jnp.broadcast_to(jnp.eye(v_BHNE.shape[2]), (*v_BHNE.shape[:3], v_BHNE.shape[2]))
                a_BHNN = call(queries_keys, one_BHNN, *rest, **kwargs)
                error = jnp.abs(a_BHNN @ v_BHNE - result).max() / jnp.maximum(jnp.abs(result).max(), 1e-30)
                seen[path] = {'A': a_BHNN[0], 'AV': merge_heads(result)[0]}, error
            elif path[-1:] == (_OUT,) and path[:-1] in seen:
                (o_B,) = args
                seen[path[:-1]][0]['UAV'] = o_B.reshape(*o_B.shape[:2], -1)[0]
            return result

        with nn.intercept_methods(look):
            fields = {'segment_ids_BN': batch.get('segment_ids'), 'positions_BN': batch.get('positions')}
            model.apply({'params': params}, batch['inputs'], **fields, method='hidden')
        return list(seen.values())

    return measure


def _rows(run: Run, split: str) -> Iterator[Batch]:
    context = run.config.data.context
    batches = run.objective.eval_batches(
        run.config.data, tokenizer=run.tokenizer, split=split, context=context, batch_size=1, max_tokens=None
    )
    for batch in batches:
        # Where rows are filled up with padding, their matrices would have fewer rows.
        if np.all(batch.get('segment_ids', 1)):
            yield on_device(batch)
