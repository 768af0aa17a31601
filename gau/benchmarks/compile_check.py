"""The real training step, compiled for a machine that need not be here: what it will hold, compute and send.

Nothing is allocated and no data are read; the vocabulary is a number. libtpu compiles for TPUs without one.
"""

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from gau.benchmarks.chips import Target
from gau.benchmarks.hlo import ON_CHIP, Collective, Program
from gau.data.config import default_config as default_data_config
from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.models.target import Target as Implementing
from gau.objectives import objective as objectives
from gau.training import config as training_config
from gau.training import mesh as meshes
from gau.training.durations import UNITS
from gau.training.setup import Run
from gau.training.traced import flops, largest_arrays

Row = dict[str, Any]

# The only fields of the data that the step's program depends on.
_DATA_FIELDS = ('context', 'batch_size', 'packing', 'attend_across_documents')
# A sweep stops when it knows the answer to within this fraction of it.
SWEEP_RESOLUTION = 1 / 16


class Check(NamedTuple):
    """What the compiler says of one training step.

    Attributes:
      row: plain numbers of one device, for JSON (see `check`).
      collectives: every communication.
      largest: (bytes, type and shape, source) of the largest arrays.
      program: the compiled program; None if it does not fit.
    """

    row: Row
    collectives: list[Collective]
    largest: list[tuple[int, str, str]]
    program: Program | None = None


def without_data(config: ConfigDict) -> ConfigDict:
    """Returns the resolved config of the same training step, but for data and durations, which it does not depend on.

    Raises:
      UserError: see `gau.training.config.resolve`.
    """
    config = config.copy_and_resolve_references()
    data = default_data_config()
    for field in _DATA_FIELDS:
        data[field] = config.data[field]
    config.data = data
    for section, stem in ((config, ''), (config.optimizer, 'warmup_')):
        for unit in UNITS:
            if stem + unit in section:
                section[stem + unit] = None
        section[f'{stem}steps'] = 1
    return training_config.resolve(config)


def make_run(config: ConfigDict, target: Target, *, vocab_size: int) -> Run:
    """Returns the run of a resolved config on the target's devices.

    Raises:
      UserError: the mesh does not fit the devices, or the batch not the mesh; the message then says what would.
    """
    mesh = meshes.make_mesh(config.mesh, target.devices)
    rows = config.data.batch_size // config.optimizer.accumulation_steps
    try:
        meshes.check_batch(mesh, batch_size=rows, context=config.data.context, model=config.model)
    except UserError as error:
        fits = what_fits(config, dict(mesh.shape))
        raise UserError(f'{error}: {" or ".join(fits)} would' if fits else str(error)) from error
    chip = Implementing.of_device(target.devices[0], sequence_shards=mesh.shape['sequence'])
    # The program knows nothing of a tokenizer but its size.
    objective, tokenizer = objectives.load(config.objective), SimpleNamespace(vocab_size=vocab_size)
    model = objective.build(config.model, data=config.data, tokenizer=tokenizer, target=chip)
    return Run(config, objective, tokenizer, mesh, model)


def what_fits(config: ConfigDict, mesh: Mapping[str, int]) -> list[str]:
    """Returns the nearest settings with which the batch of a resolved config fits a mesh, as for a command line.

    First fewer devices for the rows and more for every sequence, then a larger batch, then a longer context.

    Args:
      config: whose batch does not fit.
      mesh: size of every axis.
    """
    accumulation, data, fits = config.optimizer.accumulation_steps, config.data, []

    def works(batch_size: int, context: int, **axes: int) -> bool:
        changed = SimpleNamespace(shape={**mesh, **axes})
        try:
            rows = batch_size // accumulation
            meshes.check_batch(changed, batch_size=rows, context=context, model=config.model)
        except UserError:
            return False
        return True

    for factor in range(2, mesh['data'] + 1):
        axes = {'data': mesh['data'] // factor, 'sequence': mesh['sequence'] * factor}
        if mesh['data'] % factor == 0 and works(data.batch_size, data.context, **axes):
            # Of an axis of -1 the size follows from the others.
            given = [f'mesh.{axis}={size}' for axis, size in axes.items() if config.mesh[axis] != -1]
            fits.append(' with '.join(reversed(given)))
            break
    rows = mesh['data'] * mesh['fsdp'] * accumulation
    tokens = mesh['sequence'] * ARCHITECTURES[config.model.name].attention.shard_multiple(config.model)
    batch, context = (-(-size // unit) * unit for size, unit in ((data.batch_size, rows), (data.context, tokens)))
    for field, size, values in (
        ('batch_size', batch, (batch, data.context)),
        ('context', context, (data.batch_size, context)),
    ):
        if size != data[field] and works(*values):
            fits.append(f'data.{field}={size}')
    return fits


def what_saves_memory(config: ConfigDict, mesh: Mapping[str, int]) -> list[str]:
    """Returns settings with which a step of a resolved config holds less on a device, as for a command line.

    Args:
      config: of a step that does not fit.
      mesh: size of every axis.
    """
    optimizer, saves = config.optimizer, []
    if config.model.remat != 'full':
        saves.append('model.remat=full')
    rows, steps = config.data.batch_size // (mesh['data'] * mesh['fsdp']), optimizer.accumulation_steps
    more = next((n for n in range(steps + 1, rows + 1) if rows % n == 0), None)
    if more is not None:
        saves.append(f'optimizer.accumulation_steps={more}')
    if mesh['data'] > 1 and optimizer.sharding == 'parameters' and optimizer.name in training_config.ELEMENTWISE:
        saves.append('optimizer.sharding=data')
    if mesh['data'] % 2 == 0:
        halved = {'fsdp': 2 * mesh['fsdp'], 'data': mesh['data'] // 2}
        saves.append(' with '.join(f'mesh.{axis}={size}' for axis, size in halved.items() if config.mesh[axis] != -1))
    return saves


def check(config: ConfigDict, target: Target, *, vocab_size: int) -> Check:
    """Compiles the training step of a config and returns what its program says.

    The row holds, for one device: `argument_bytes` (state and batch), `output_bytes` (those that do not take an
    argument's place), `temporary_bytes`, `code_bytes`, their sum `total_bytes`, `memory_bytes` of the device, `fits`
    (None where its memory is not known); `flops` of the matmuls in a step as traced, recomputation and masked
    halves included, and `model_flops`, three times the forward pass in closed form; `traffic_bytes` of its memory and
    `on_chip_bytes`, those that memories on the chip spare it;
    `collectives`, kind to count and bytes a step; `seconds` that compute, memory and links need at least, `compiler`,
    the compiler's own estimate of its kernels, and `kernels`, what those of Pallas, of which it estimates nothing, need
    at least by our counts, `kernel_flops` and `kernel_bytes`; `step_seconds`, and `mfu`, the model FLOPs utilisation
    that goes with it. If it does not fit, only what was known before, and `smaller_with`, settings that hold less.

    Raises:
      UserError: the config is impossible.
    """
    config = without_data(config)
    run = make_run(config, target, vocab_size=vocab_size)
    train_step, state, batch = run.train_step(), run.abstract_state, run.abstract_batch
    row = _about(run, target)
    with run.context():
        traced = train_step.trace(state, batch)
        row['flops'] = flops(traced.jaxpr) / run.mesh.size
        row['kernel_flops'] = flops(traced.jaxpr, custom_kernels_only=True) / run.mesh.size
        lowered = traced.lower()
        start = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if 'RESOURCE_EXHAUSTED' not in str(error):
                raise
            row |= {'fits': False, 'error': str(error).partition(': ')[2].splitlines()[0]}
            row['smaller_with'] = what_saves_memory(config, run.mesh.shape)
            return Check(row, [], largest_arrays(traced.jaxpr, run.mesh.size))
    row['compile_seconds'] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    row |= {
        'argument_bytes': memory.argument_size_in_bytes,
        'output_bytes': memory.output_size_in_bytes - memory.alias_size_in_bytes,
        'temporary_bytes': memory.temp_size_in_bytes,
        'code_bytes': memory.generated_code_size_in_bytes,
    }
    total = sum(row[f'{part}_bytes'] for part in ('argument', 'output', 'temporary', 'code'))
    row |= {'total_bytes': total, 'fits': None if target.memory_bytes is None else total <= target.memory_bytes}
    program = Program(compiled.as_text())
    collectives = program.collectives()
    row |= {
        'traffic_bytes': program.traffic(),
        'on_chip_bytes': program.traffic(ON_CHIP),
        'kernel_bytes': program.custom_kernel_traffic(),
        'collectives': _by_kind(collectives),
    }
    row |= _times(row, collectives, program.cycles(), target)
    return Check(row, collectives, program.largest_arrays(5), program)


def shardings(config: ConfigDict, target: Target, *, vocab_size: int) -> str:
    """Returns how every parameter and the main activations lie on the target's devices, as text; compiles nothing.

    Raises:
      UserError: the config is impossible.
    """
    return make_run(without_data(config), target, vocab_size=vocab_size).sharding_table()


def sweep(
    config: ConfigDict, field: str, target: Target, *, vocab_size: int, report: Callable[[Row], None]
) -> tuple[int, Row] | None:
    """Returns the largest batch or context that fits, to within SWEEP_RESOLUTION, and its row; None if none does.

    Doubles from the config's own value, then halves the interval.

    Args:
      config: not resolved, so that what depends on the context follows it.
      field: 'batch' or 'context'.
      target: whose memory must be known.
      vocab_size: V.
      report: is given every row as it comes.

    Raises:
      UserError: the memory of the target is not known.
    """
    if target.memory_bytes is None:
        raise UserError(f'--sweep: how much memory a device of --topology={target.name} has is not known')
    mesh = meshes.make_mesh(config.mesh, target.devices).shape
    name = {'batch': 'batch_size', 'context': 'context'}[field]
    unit = mesh['data'] * mesh['fsdp'] * config.optimizer.accumulation_steps
    if field == 'context':
        unit = math.lcm(mesh['sequence'] * (config.model.chunk_size or 256), 512)
    rows: dict[int, Row] = {}

    def fits(units: int) -> bool:
        tried = config.copy_and_resolve_references()
        tried.data[name] = units * unit
        rows[units] = check(tried, target, vocab_size=vocab_size).row
        report(rows[units])
        return bool(rows[units]['fits'])

    low, high = 0, max(config.data[name] // unit, 1)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low * SWEEP_RESOLUTION):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return (low * unit, rows[low]) if low else None


def _about(run: Run, target: Target) -> Row:
    config = run.config
    return {
        'model': config.model.name,
        'size': config.model.size,
        'objective': config.objective,
        'context': config.data.context,
        'batch_size': config.data.batch_size,
        'layer_stack': config.model.layer_stack,
        'num_layers': config.model.num_layers,
        'remat': config.model.remat,
        'impl': run.model.implementation.attention,
        'topology': target.name,
        'device': target.devices[0].device_kind,
        'mesh': dict(run.mesh.shape),
        'devices': len(target.devices),
        'memory_bytes': target.memory_bytes,
        'model_flops': 3 * run.flops_per_token * run.tokens_per_step / run.mesh.size,
        'jax': jax.__version__,
    }


def _by_kind(collectives: list[Collective]) -> dict[str, dict[str, int]]:
    kinds: dict[str, dict[str, int]] = defaultdict(lambda: {'count': 0, 'bytes': 0})
    for collective in collectives:
        kinds[collective.kind]['count'] += collective.times
        kinds[collective.kind]['bytes'] += collective.bytes
    return dict(kinds)


def _times(row: Row, collectives: list[Collective], cycles: int | None, target: Target) -> Row:
    """What each part needs at least, and a whole step: communication is taken to hide behind nothing."""
    if target.chip is None:
        return {}
    seconds = {
        'compute': row['flops'] / target.peak_flops,
        'memory': row['traffic_bytes'] / target.chip.hbm_bandwidth,
        'links': sum(collective.sent for collective in collectives) / target.chip.link_bandwidth,
        'compiler': cycles / target.chip.clock if cycles else None,
        'kernels': max(row['kernel_flops'] / target.peak_flops, row['kernel_bytes'] / target.chip.hbm_bandwidth)
        or None,
    }
    at_least = max(seconds['compute'], seconds['memory'], seconds['links'])
    by_compiler = seconds['compiler'] + (seconds['kernels'] or 0) if seconds['compiler'] else at_least
    likely = max(at_least, by_compiler + seconds['links'])
    mfu = {name: row['model_flops'] / target.peak_flops / time for name, time in (('', likely), ('_bound', at_least))}
    return {
        'seconds': seconds,
        'step_seconds': likely,
        'step_seconds_bound': at_least,
        'mfu': mfu[''],
        'mfu_bound': mfu['_bound'],
    }


def describe(check: Check) -> str:
    """Returns a check as a page of text."""
    row = check.row
    mesh = ' x '.join(f'{axis} {size}' for axis, size in row['mesh'].items())
    lines = [
        f'{row["model"]} ({row["size"]}), {row["objective"]}, batch {row["batch_size"]} x {row["context"]}, layers '
        f'{row["layer_stack"]}, remat {row["remat"]}, impl {row["impl"]}',
        f'{math.prod(row["mesh"].values())} x {row["device"]} ({row["topology"]}): {mesh}',
        '',
    ]
    if 'total_bytes' in row:
        lines.append(f'compiled in   {row["compile_seconds"]:.1f} s')
        lines.append(
            f'memory        {_gib(row["total_bytes"])} a device: arguments {_gib(row["argument_bytes"])}, outputs '
            f'{_gib(row["output_bytes"])}, temporaries {_gib(row["temporary_bytes"])}, code {_gib(row["code_bytes"])}'
        )
    lines.append(f'              {verdict(row)}')
    if row.get('smaller_with'):
        lines.append(f'              smaller with {" or ".join(row["smaller_with"])}')
    if row['fits'] is not True:
        lines.append(
            'largest       ' + ('as compiled' if 'total_bytes' in row else 'as traced, if divided evenly') + ':'
        )
        lines += [f'              {_gib(size):>10}  {shape}  {_short(source)}' for size, shape, source in check.largest]
    traced, closed = _giga(row['flops']), _giga(row['model_flops'])
    lines.append(f'FLOPs         {traced} a device and step as traced, {closed} by the closed form')
    if 'total_bytes' not in row:
        return '\n'.join(lines)
    on_chip = f', and {_gib(row["on_chip_bytes"])} of memory on the chip' if row['on_chip_bytes'] else ''
    lines.append(f"traffic       {_gib(row['traffic_bytes'])} of a device's memory{on_chip}")
    for kind, found in sorted(row['collectives'].items()):
        lines.append(f'{kind:22} {found["count"]:5} a step, {found["bytes"] / 2**20:,.1f} MiB')
    if not row['collectives']:
        lines.append('collectives   none')
    if 'seconds' in row:
        parts = ', '.join(f'{name} {1e3 * value:.1f}' for name, value in row['seconds'].items() if value is not None)
        lines.append(f'ms a step     {parts}')
        lines.append(
            f'estimate      {1e3 * row["step_seconds"]:.1f} ms, MFU {row["mfu"]:.2f}; at best '
            f'{1e3 * row["step_seconds_bound"]:.1f} ms, MFU {row["mfu_bound"]:.2f}'
        )
    return '\n'.join(lines)


def verdict(row: Row) -> str:
    """Returns whether it fits, in words."""
    if row['fits'] is None:
        return 'how much memory the device has is not known'
    if row['fits']:
        return f'fits into {_gib(row["memory_bytes"])}'
    return f'does not fit: {row["error"]}' if 'error' in row else f'does not fit into {_gib(row["memory_bytes"])}'


def _gib(size: float) -> str:
    return f'{size / 2**30:.2f} GiB' if size >= 2**30 / 10 else f'{size / 2**20:.1f} MiB'


def _giga(number: float) -> str:
    return f'{number / 1e12:.3f} T' if number >= 1e11 else f'{number / 1e9:.3f} G'


def _short(source: str) -> str:
    source = re.sub(r'(jit|jvp|transpose|checkpoint|rematted_computation)\(([^()]*)\)', r'\2', source)
    return source if len(source) <= 80 else '...' + source[-77:]
