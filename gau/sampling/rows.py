"""Rows of a batch spread over devices: each reads and writes its own, and holds all parameters."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gau.errors import UserError

ROWS = 'rows'
# How the dimensions of arguments and results lie: whole on every device, or cut along their first or second one. A
# decoding state has its rows first, in layers that are scanned second.
WHOLE, FIRST, SECOND = PartitionSpec(), PartitionSpec(ROWS), PartitionSpec(None, ROWS)
STATE = 'state'


def check(rows: int, devices: int) -> None:
    """Raises UserError where so many rows cannot be spread over so many devices."""
    if devices > jax.device_count():
        raise UserError(f'there are {jax.device_count()} devices to spread rows over, not {devices}')
    if rows % devices:
        raise UserError(f'a batch of {rows} does not divide over {devices} devices')


def check_tensor(tensor: int) -> None:
    """Raises UserError where layers cannot be split over so many devices."""
    if jax.device_count() % tensor:
        count = jax.device_count()
        raise UserError(f'layers cannot be split over {tensor} devices: {tensor} does not divide the {count} at hand')


@functools.cache
def mesh_of(devices: int) -> Mesh:
    """Returns the first so many devices in a row."""
    return jax.make_mesh((devices,), (ROWS,), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def place(tree: Any, lies: Any, *, model: nn.Module, devices: int) -> Any:
    """Returns arrays on these devices; `lies` is one of WHOLE, FIRST, SECOND and STATE."""
    if devices == 1:
        return tree
    specs = _specs(lies, tree, model)
    mesh = mesh_of(devices)
    if lies != STATE:
        return jax.device_put(tree, NamedSharding(mesh, specs))
    return {name: jax.device_put(leaf, NamedSharding(mesh, specs[name])) for name, leaf in tree.items()}


def over_devices(
    function: Callable[..., tuple], model: nn.Module, devices: int, *, lies: Sequence[Any], results: Sequence[Any]
) -> Callable[..., tuple]:
    """Returns a function of several rows that every device calls on its own; on one device the function itself.

    Args:
      function: from arrays to a tuple of arrays; one of both is a decoding state.
      model: whose state it is.
      devices: how many.
      lies: of the arguments, each WHOLE, FIRST, SECOND or STATE.
      results: of the results.
    """
    if devices == 1:
        return function

    def call(*arguments):
        state = arguments[lies.index(STATE)]
        mapped = jax.shard_map(
            function,
            mesh=mesh_of(devices),
            in_specs=tuple(_specs(one, state, model) for one in lies),
            out_specs=tuple(_specs(one, state, model) for one in results),
            # Kernels do not say along which axes their results differ.
            check_vma=False,
        )
        return mapped(*arguments)

    return call


def _specs(lies: Any, state: Any, model: nn.Module) -> Any:
    if lies != STATE:
        return lies
    layers = SECOND if model.config.layer_stack == 'scan' else FIRST
    return {name: FIRST if name == 'position' else layers for name in state}
