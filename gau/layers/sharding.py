"""An op on every device's own part of its arrays, where a mesh is set: for what the compiler cannot partition well.

The compiler cuts matmuls and sums by itself (`gau.layers.common.constrain` says how). Sums that run along a sharded
sequence it would gather, and kernels it does not understand; those run inside `jax.shard_map`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax import Array
from jax.sharding import AxisType, PartitionSpec

from gau.layers.common import over_heads

Names = Sequence[str | None]


def over_mesh(
    op: Callable[..., Any],
    *operands: Array | None,
    axes: Sequence[Names],
    result_like: int,
    result_axes: Names | None = None,
    token_multiple: int | None,
) -> Any:
    """Returns op(*operands, sequence_axis=...), computed by every device on its own part of the operands.

    Without a mesh of several devices, without axis rules, or inside another `shard_map`, it is called as it is, with
    sequence_axis=None.

    A dimension is cut along the mesh axes that the rules give its name (`gau.training.mesh.AXIS_RULES`), unless they do
    not divide it or an earlier dimension of the array has them: then it is whole on every device, as it is where it has
    no name. So `('batch', 'act_heads', 'length', 'act_expanded')` cuts the heads, or the width of a lone head.

    Args:
      op: takes parts of the operands, None where an operand is None, and `sequence_axis`: the mesh axis along which
        the dimensions named 'length' are cut, or None where they are whole. It may use collectives over that axis.
      *operands: arrays, or None.
      axes: the logical name of every dimension of every operand.
      result_like: which operand the result, or each array of it, has the shape of, but for dimensions without a name,
        and lies as.
      result_axes: the names of the result's dimensions, all of them names of that operand's; None: the same ones.
      token_multiple: each device must get a multiple of this many tokens (a chunk), or they stay whole; None: they
        stay whole.

    Raises:
      KeyError: a name has no rule.
    """
    if not _cut_by_rules():
        return op(*operands, sequence_axis=None)
    mesh = jax.sharding.get_abstract_mesh()
    given = [i for i, operand in enumerate(operands) if operand is not None]
    cuts = {i: _cut(operands[i].shape, axes[i], token_multiple) for i in given}
    along = {entry for i in given for entry, name in zip(cuts[i], axes[i], strict=True) if name == 'length' and entry}
    sequence_axis = next((axis for (axis,) in along if mesh.shape[axis] > 1), None)

    def local(*parts: Array) -> Any:
        everything = dict(zip(given, parts, strict=True))
        return op(*(everything.get(i) for i in range(len(operands))), sequence_axis=sequence_axis)

    lies = dict(zip(axes[result_like], cuts[result_like], strict=True))
    # Unchecked, since kernels do not say along which axes their results differ.
    mapped = jax.shard_map(
        local,
        in_specs=tuple(PartitionSpec(*cuts[i]) for i in given),
        out_specs=PartitionSpec(*(lies[name] for name in result_axes or axes[result_like])),
        check_vma=False,
    )
    return mapped(*(operands[i] for i in given))


def sum_over_mesh(op: Callable[..., Array], *operands: Array, axes: Sequence[Names]) -> Array:
    """Returns the sum over devices of op(*operands, alone=True), a scalar, that each computes for its own parts.

    An operand without names is whole on every device, and its gradient is summed over devices once. Where `over_mesh`
    would call an op as it is, so does this; `alone` then says whether a single device has the operands.

    Args:
      op: takes parts of the operands.
      *operands: arrays.
      axes: the logical name of every dimension of every operand, cut as in `over_mesh`; dimensions of the same name
        must have the same size.
    """
    if not _cut_by_rules():
        mesh = jax.sharding.get_abstract_mesh()
        return op(*operands, alone=mesh.size <= 1 or AxisType.Manual in mesh.axis_types)
    cuts = [_cut(operand.shape, names, 1) for operand, names in zip(operands, axes, strict=True)]
    used = tuple(dict.fromkeys(axis for entries in cuts for entry in entries if entry for axis in entry))
    mapped = jax.shard_map(
        lambda *parts: op(*parts, alone=True)[None],
        in_specs=tuple(PartitionSpec(*entries) for entries in cuts),
        out_specs=PartitionSpec(used or None),
        check_vma=False,
    )
    return mapped(*operands).sum()


def parts_of(name: str) -> int:
    """Returns into how many parts the mesh and the axis rules cut dimensions of this name; 1 without either."""
    if not _cut_by_rules():
        return 1
    return math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in _mesh_axes(name))


def devices_together() -> int:
    """Returns how many devices have an array together: those of the mesh, but one inside `jax.shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    # The size is 0 where no mesh is set.
    return 1 if AxisType.Manual in mesh.axis_types else max(1, mesh.size)


def _cut_by_rules() -> bool:
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.size > 1 and bool(nn.get_logical_axis_rules()) and AxisType.Manual not in mesh.axis_types


def _mesh_axes(name: str | None) -> tuple[str, ...]:
    entry = dict(nn.get_logical_axis_rules())[name] if name is not None else None
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _cut(shape: Sequence[int], names: Names, token_multiple: int | None) -> list[tuple[str, ...] | None]:
    """Returns the mesh axes along which each dimension is cut."""
    mesh, entries, used = jax.sharding.get_abstract_mesh(), [], set()
    for size, name in zip(shape, names, strict=True):
        entry = _mesh_axes(name)
        number = math.prod(mesh.shape[axis] for axis in entry)
        if name == 'length':
            number *= token_multiple or math.inf
        fits = entry and size % number == 0 and not used.intersection(entry)
        entries.append(entry if fits else None)
        used.update(entry if fits else ())
    return entries


def attention_over_mesh(
    op: Callable[..., Array],
    *x_BHNK: Array,
    bias: Array | None,
    segment_ids_BN: Array | None,
    token_multiple: int | None,
) -> Array:
    """Applies a single-head op(x_BNK..., bias, segment_ids_BN=..., sequence_axis=...) to all heads on all devices.

    Args:
      op: returns what is shaped as its last array x.
      *x_BHNK: queries, keys, ... and values last, [B, H, N, K]; the last dimension of the values may be cut.
      bias: relative bias [H, ...], whole on every device but for its heads, or None.
      segment_ids_BN: documents and padding, or None.
      token_multiple: see `over_mesh`.
    """

    def all_heads(*operands: Array | None, sequence_axis: str | None) -> Array:
        *parts, bias, ids = operands
        single = functools.partial(op, segment_ids_BN=ids, sequence_axis=sequence_axis)
        return over_heads(single, *parts, bias=bias)

    head = ('batch', 'act_heads', 'length')
    bias_axes = () if bias is None else ('act_heads', *[None] * (bias.ndim - 1))
    return over_mesh(
        all_heads,
        *x_BHNK,
        bias,
        segment_ids_BN,
        axes=[(*head, None)] * (len(x_BHNK) - 1) + [(*head, 'act_expanded'), bias_axes, ('batch', 'length')],
        result_like=len(x_BHNK) - 1,
        token_multiple=token_multiple,
    )
