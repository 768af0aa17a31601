"""Trained models made smaller: fewer columns of the gated unit, weights that are zero, weights of eight bits.

The result is a work directory like any other: `eval.py`, `scripts/sample.py` and `scripts/export.py` open it, and a run
that recovers what was lost starts from it (`--init_from`); with `optimizer.keep_zeros` its zeros stay.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gau import outputs
from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.families.gated_unit import GatedUnit
from gau.models.widths import expanded_dim
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints, count_parameters
from gau.training.config import resolve
from gau.training.load import load_run
from gau.training.optimizer import STACKED, matrix_axes
from gau.training.setup import Run
from gau.training.step import TrainState

# By path, without the leading axis of layers stacked by a scan, which `Leaf.stacked` says.
Leaves = dict[tuple[str, ...], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Compressed:
    """Parameters, the fields of the model that are others now, and what there is to say of it."""

    params: Leaves
    model: Mapping[str, Any]
    report: Mapping[str, Any]


def compress(
    workdir: str | Path,
    output: str | Path,
    method: Callable[[Leaves, ConfigDict], Compressed],
    *,
    step: int | None = None,
) -> dict[str, Any]:
    """Writes a checkpoint, compressed, as a new work directory; whole or not at all.

    Args:
      workdir: of the run.
      output: directory to make.
      method: what is done to the parameters: `narrower`, `sparser` or `rounded`, with their arguments.
      step: checkpoint; None means the newest.

    Returns:
      What DIR/compression.json holds.

    Raises:
      UserError: there is something at `output`, there is no such checkpoint, or what the method says of the model.
    """
    output = Path(output)
    outputs.check_directory(output)
    run, params, step = load_run(workdir, step=step)
    trained = run.config
    leaves = {path: np.asarray(x) for path, x in flax.traverse_util.flatten_dict(jax.device_get(params)).items()}
    result = method(leaves, trained.model)
    config = files.read_config(Path(workdir))
    # What is rounded needs no rounding any more.
    config.quantization = 'none'
    for field, value in result.model.items():
        config.model[field] = value
    config = resolve(config)
    smaller = Run.from_config(_on_this_machine(config, run))
    wanted = smaller.abstract_params
    params = jax.tree.map(
        lambda leaf, x: jax.device_put(x.astype(leaf.dtype), leaf.sharding),
        wanted,
        flax.traverse_util.unflatten_dict(result.params),
    )
    state = TrainState(step=jnp.asarray(step, jnp.int32), params=params, opt_state=smaller.optimizer.init(params))
    report = {
        'source': str(Path(workdir).absolute()),
        'step': step,
        'parameters': {'before': sum(x.size for x in leaves.values()), 'after': count_parameters(params)},
        **result.report,
    }
    _write(output, Path(workdir), config, smaller, state, report)
    return report


def narrower(leaves: Leaves, model: ConfigDict, *, expansion_factor: float) -> Compressed:
    """Cuts E of every gated unit to a smaller multiple of D: columns of U and V with their rows of Wo.

    Of every head the columns stay whose norms, of all that goes in and comes out, have the largest products. What is
    left is the unit of that width, exactly: a column of U, one of V and a row of Wo speak to nothing but each other.

    Raises:
      UserError: the model has no gated units, or E would not be a smaller whole number that the heads divide.
    """
    if not isinstance(ARCHITECTURES[model.name].family, GatedUnit):
        raise UserError(f'model.name={model.name} has no gated units, whose E is cut; flash and flash_quad have')
    before, wanted = expanded_dim(model), expansion_factor * model.model_dim
    if not 0 < wanted < before or abs(wanted - round(wanted)) > 1e-6:
        raise UserError(
            f'--expansion_factor={expansion_factor} times D = {model.model_dim} is {wanted:g}: want a whole number '
            f'below the {before} that E is now'
        )
    wanted, heads = round(wanted), model.num_heads
    if wanted % heads:
        raise UserError(f'E = {wanted} does not divide over the {heads} heads')
    cut = dict(leaves)
    kept = 0.0
    units = [path[:-2] for path in leaves if path[-3:] == ('gau', 'uv', 'kernel')]
    for unit in units:
        stacked = STACKED in unit
        names = (('uv', 'kernel'), ('uv', 'bias'), ('out', 'kernel'))
        arrays = [leaves[*unit, *name] if stacked else leaves[*unit, *name][None] for name in names]
        layers = []
        for uv, bias, out in zip(*arrays, strict=True):
            scores_E = np.prod(np.linalg.norm(uv, axis=0), axis=0) * np.linalg.norm(out, axis=-1)
            chosen = _largest(scores_E.reshape(heads, -1), wanted // heads)
            kept += scores_E[chosen].sum() / scores_E.sum()
            layers.append((uv[..., chosen], bias[..., chosen], out[chosen]))
        for name, parts in zip(names, zip(*layers, strict=True), strict=True):
            cut[*unit, *name] = np.stack(parts) if stacked else parts[0]
    count = sum(len(leaves[*unit, 'uv', 'kernel']) if STACKED in unit else 1 for unit in units)
    report = {
        'method': 'narrower',
        'expanded_dim': {'before': before, 'after': wanted},
        'kept_scores': float(kept / count),
    }
    return Compressed(cut, {'expansion_factor': expansion_factor}, report)


def sparser(leaves: Leaves, model: ConfigDict, *, pattern: str) -> Compressed:
    """Sets the smallest weights of every kernel of the layers to zero; embedding, norms and biases stay.

    Args:
      leaves: parameters by path.
      model: not asked.
      pattern: a share of every kernel such as `0.5`; or `2:4`, the two smallest of every four neighbours along the
        inputs.

    Raises:
      UserError: another pattern, or inputs that are no multiple of four.
    """
    del model
    share = _share(pattern)
    pruned, zeros, total = dict(leaves), 0, 0
    for path, inputs in _kernels(leaves).items():
        kernel = leaves[path]
        keep = _two_of_four(kernel, inputs, path) if share is None else _largest_share(kernel, path, 1 - share)
        pruned[path] = np.where(keep, kernel, 0)
        zeros, total = zeros + int((~keep).sum()), total + kernel.size
    return Compressed(pruned, {}, {'method': 'sparser', 'pattern': pattern, 'zeros': zeros, 'of_kernels': total})


def rounded(leaves: Leaves, model: ConfigDict) -> Compressed:
    """Rounds every kernel to integers of 8 bits times a scale for each output, the embedding's for each token, by qwix.

    The parameters are stored as what these integers mean, in float32, so that every path computes with them; products
    and attention stay in the compute type. What has no matmul, such as norms, biases and gamma, stays as it is.

    Raises:
      UserError: qwix is missing.
    """
    del model
    try:
        import qwix
    except ImportError as error:
        raise UserError('--method=rounded needs qwix: pip install -r requirements-compress.txt') from error
    result, bytes_after = dict(leaves), 0
    kernels = _kernels(leaves, vocabulary=True)
    for path, inputs in kernels.items():
        # Every axis but those of the inputs has scales of its own.
        channels = [axis for axis in range(leaves[path].ndim) if axis not in inputs]
        array = qwix.quantize(jnp.asarray(leaves[path]), jnp.int8, channelwise_axes=channels)
        result[path] = np.asarray(qwix.dequantize(array), leaves[path].dtype)
        bytes_after += array.qvalue.size + 4 * array.scale.size
    rest = sum(x.size for path, x in leaves.items() if path not in kernels)
    report = {
        'method': 'rounded',
        'bytes': {
            'in_16_bits': 2 * sum(x.size for x in leaves.values()),
            'after': bytes_after + 2 * rest,
        },
    }
    return Compressed(result, {}, report)


def _kernels(leaves: Leaves, *, vocabulary: bool = False) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Returns the paths of the layers' kernels, if asked the vocabulary's too, with the axes of their inputs."""
    found = {}
    for path, x in leaves.items():
        axes = matrix_axes('/'.join(path), x)
        if axes is not None:
            found[path] = axes[0]
        elif vocabulary and path[-2:] in (('embedding', 'kernel'), ('output', 'kernel')):
            found[path] = (1,)
    return found


def _share(pattern: str) -> float | None:
    if pattern == '2:4':
        return None
    try:
        share = float(pattern)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise UserError(f'--pattern={pattern}: want 2:4, or a share of the weights in 0..1 such as 0.5')
    return share


def _largest(scores_HE: np.ndarray, count: int) -> np.ndarray:
    """Returns the places of the largest scores of every head, ascending, in the axis of all heads."""
    heads, width = scores_HE.shape
    best = np.sort(np.argsort(-scores_HE, axis=1, kind='stable')[:, :count], axis=1)
    return (best + np.arange(heads)[:, None] * width).reshape(-1)


def _largest_share(kernel: np.ndarray, path: tuple[str, ...], share: float) -> np.ndarray:
    """Returns which weights are the largest of their kernel, one layer at a time."""
    sizes = np.abs(kernel if STACKED in path else kernel[None])
    flat = sizes.reshape(len(sizes), -1)
    keep = np.zeros(flat.shape, bool)
    best = np.argsort(-flat, axis=1, kind='stable')[:, : round(share * flat.shape[1])]
    np.put_along_axis(keep, best, True, axis=1)
    return keep.reshape(kernel.shape)


def _two_of_four(kernel: np.ndarray, inputs: tuple[int, ...], path: tuple[str, ...]) -> np.ndarray:
    # The inputs as one axis, the last: neighbours are what a matmul sums up one after the other.
    moved = np.moveaxis(np.abs(kernel), inputs, range(-len(inputs), 0))
    size = int(np.prod([kernel.shape[axis] for axis in inputs]))
    if size % 4:
        raise UserError(f'{"/".join(path)} has {size} inputs, no multiple of four: 2:4 does not fit it')
    fours = moved.reshape(*moved.shape[: -len(inputs)], size // 4, 4)
    order = np.argsort(-fours, axis=-1, kind='stable')
    keep = np.zeros(fours.shape, bool)
    np.put_along_axis(keep, order[..., :2], True, axis=-1)
    return np.moveaxis(keep.reshape(moved.shape), range(-len(inputs), 0), inputs)


def _on_this_machine(config: ConfigDict, run: Run) -> ConfigDict:
    """Returns the config with the mesh and the implementation that `run` was opened with."""
    config = config.copy_and_resolve_references()
    config.mesh = run.config.mesh
    config.model.impl = run.config.model.impl
    return config


def _write(
    output: Path, source: Path, config: ConfigDict, run: Run, state: TrainState, report: Mapping[str, Any]
) -> None:
    before = Checkpoints(source)
    try:
        streams, identity = before.read_streams(report['step']), before.meta(report['step']).get('data', {})
    finally:
        before.close()
    with outputs.directory(output) as aside:
        tree = files.config_to_dict(config)
        saved = Checkpoints(aside, config.checkpoint)
        iterator = SimpleNamespace(get_state=lambda: streams)
        saved.save(report['step'], state, iterator, config=tree, data=identity)
        saved.close()
        files.write_json(aside / files.CONFIG, tree)
        if (source / files.DATA).is_file():
            shutil.copyfile(source / files.DATA, aside / files.DATA)
        files.write_text(aside / files.PARAMETERS, run.parameter_table(state.params))
        (aside / files.COMPRESSION).write_text(json.dumps(report, indent=2) + '\n', encoding='utf-8')
