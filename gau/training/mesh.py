"""The device mesh and the one table that says which logical axis of an array lies along which mesh axis."""

import math
from typing import Any

import flax.linen as nn
import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gau.errors import UserError, did_you_mean
from gau.models.architectures import ARCHITECTURES
from gau.training.config import MESH_AXES

# Parameters first, activations below. An axis left at None is whole on every device.
AXIS_RULES = (
    ('vocab', 'tensor'),
    ('embed', 'fsdp'),
    ('expanded', 'tensor'),
    ('heads', 'tensor'),
    ('query_key', None),
    ('head_dim', None),
    ('position', None),
    ('norm', None),
    ('layers', None),
    ('batch', ('data', 'fsdp')),
    ('length', 'sequence'),
    ('act_embed', None),
    ('act_expanded', 'tensor'),
    ('act_heads', 'tensor'),
)


def make_mesh(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """Builds the mesh over the axes data, fsdp, tensor, sequence.

    Args:
      config: the config's `mesh` section; one axis may be -1, which takes the devices left over; without it, one
        process may leave devices unused.
      devices: all devices of the run; None means `jax.devices()`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config[axis] for axis in MESH_AXES]
    named = ', '.join(f'mesh.{axis}={size}' for axis, size in zip(MESH_AXES, sizes, strict=True))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f'{named}: sizes are positive, and at most one is -1')
    fixed = math.prod(size for size in sizes if size != -1)
    if -1 not in sizes and fixed < len(devices) and jax.process_count() == 1:
        devices = devices[:fixed]
    sizes = [len(devices) // fixed if size == -1 else size for size in sizes]
    if math.prod(sizes) != len(devices):
        raise UserError(f'{named}: the sizes must multiply to the {len(devices)} device(s) at hand')
    # Auto: the compiler propagates shardings from the constraints; Linen's logical partitioning needs this type.
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError:
        # An axis of 2 in a network of 4 x 4 x 4 TPUs: half of a physical axis, which make_mesh does not cut by itself.
        cut = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        return Mesh(cut, MESH_AXES, axis_types=types)


def idle(used: int, devices: int) -> str:
    """Returns the line that says how many of the devices a mesh uses, and how to ask for all; '' if it uses all."""
    if used == devices:
        return ''
    return f'the mesh uses {used} of {devices} devices; --config.mesh.data=-1 asks for all of them'


def partition_spec(names: tuple[str | None, ...] | PartitionSpec, *, where: str = 'an array') -> PartitionSpec:
    """Translates logical axis names into mesh axes.

    Raises:
      UserError: a name that is not in AXIS_RULES, or two dimensions on one mesh axis.
    """
    rules = dict(AXIS_RULES)
    axes = []
    for name in names:
        if name is not None and name not in rules:
            raise UserError(f'logical axis "{name}" of {where} is not in AXIS_RULES{did_you_mean(name, rules)}')
        axes.append(rules[name] if name is not None else None)
    used = [axis for entry in axes for axis in (entry if isinstance(entry, tuple) else (entry,)) if axis]
    if len(used) != len(set(used)):
        raise UserError(f'{where} with logical axes {tuple(names)} would use a mesh axis twice: {tuple(axes)}')
    return PartitionSpec(*axes)


def shardings(boxed_tree: Any, mesh: Mesh) -> Any:
    """Returns the NamedSharding of every leaf of a tree of (abstract) arrays boxed with logical axis names.

    Raises:
      UserError: see `partition_spec`; or a dimension does not divide over its mesh axes.
    """
    specs = nn.get_partition_spec(boxed_tree)
    shapes = nn.unbox(boxed_tree)

    def one(path: Any, leaf: Any, names: PartitionSpec) -> NamedSharding:
        where = path_name(path)
        # A dimension of one, such as the heads of a one-head GAU, has nothing to divide.
        spec = partition_spec([None if n == 1 else name for n, name in zip(leaf.shape, names)], where=where)  # noqa: B905
        for size, axes in zip(leaf.shape, spec, strict=False):
            parts = math.prod(mesh.shape[axis] for axis in (axes if isinstance(axes, tuple) else (axes,)) if axis)
            if size % parts:
                raise UserError(
                    f'{where} has a dimension of {size}, which does not divide over mesh axis {axes}={parts}'
                )
        return NamedSharding(mesh, spec)

    return jax.tree_util.tree_map_with_path(one, shapes, specs)


def over_data(shape: tuple[int, ...], sharding: NamedSharding) -> NamedSharding:
    """Returns the sharding with the first dimension that the mesh axis `data` divides cut over it, too.

    So the optimizer's state lies with `optimizer.sharding=data` (ZeRO-1; Rajbhandari et al. 2020, arXiv 1910.02054).
    """
    mesh = sharding.mesh
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    for dimension, (size, entry) in enumerate(zip(shape, entries, strict=True)):
        axes = entry if isinstance(entry, tuple) else (entry,) if entry else ()
        if size % (mesh.shape['data'] * math.prod(mesh.shape[axis] for axis in axes)) == 0:
            entries[dimension] = (*axes, 'data')
            return NamedSharding(mesh, PartitionSpec(*entries))
    return sharding


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of every [B, N] array of a batch."""
    return NamedSharding(mesh, partition_spec(('batch', 'length')))


def check_batch(mesh: Mesh, *, batch_size: int, context: int, model: ConfigDict) -> None:
    """Raises UserError unless [batch_size, context] arrays divide over the mesh, in whole chunks of the model."""
    rows, shards = mesh.shape['data'] * mesh.shape['fsdp'], mesh.shape['sequence']
    if batch_size % rows:
        fits = max(part for part in range(1, rows) if batch_size % part == 0)
        raise UserError(
            f'a batch of {batch_size} sequences does not divide over mesh data x fsdp = {rows}; '
            f'--config.mesh.data={fits} --config.mesh.fsdp=1 fits, or a data.batch_size that {rows} divides'
        )
    if context % shards:
        raise UserError(f'data.context={context} does not divide over mesh.sequence={shards}')
    multiple = ARCHITECTURES[model.name].attention.shard_multiple(model)
    if shards > 1 and context // shards % multiple:
        raise UserError(
            f'data.context={context} over mesh.sequence={shards} is {context // shards} tokens a device; a device must '
            f'hold a multiple of {multiple} for {model.name}'
        )


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a key path as `blocks_0/gau/out/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator='/')
