"""Compiles the training step of a config for a machine that is not there, and says whether and how it would run.

    python scripts/compile_check.py --config=configs/lm.py:context=4096 --topology=v4:4x4x4
    python scripts/compile_check.py --config=configs/lm.py:size=large --topology=v5e:4x4 --config.mesh.fsdp=-1 \
        --config.mesh.data=1 --config.model.remat=full --sweep=batch
    python scripts/compile_check.py --config=configs/lm.py:runlocal --topology=cpu:8 --config.mesh.data=4 \
        --config.mesh.sequence=2
    python scripts/compile_check.py --config=configs/lm.py --topology=v4:1x1x1 --breakdown
    python scripts/compile_check.py --table=docs/tpu_v4_64.md       models of base size: two hours

TPU topologies (v4, v5e, v5p, v6e) are compiled for by libtpu, a package that needs no TPU: `pip install libtpu` in the
version that `jax[tpu]` asks for. `--config.model.layer_stack=scan` compiles several times faster. No data are read.
"""

import json

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError, warn

_TOPOLOGY = flags.DEFINE_string(
    'topology', 'local', 'v4:4x4x4, v5e:.., v5p:.., v6e:..; cpu:8, simulated; or local, the devices here.'
)
_SWEEP = flags.DEFINE_enum('sweep', None, ['batch', 'context'], 'Find the largest that fits.')
_SHARDINGS = flags.DEFINE_boolean('shardings', False, 'Print how parameters and activations are sharded; no compiling.')
_BREAKDOWN = flags.DEFINE_boolean('breakdown', False, 'Print where cycles and bytes go, by part and by operation.')
flags.DEFINE_string('json', None, 'File to which every result is appended as a line of JSON.')
flags.DEFINE_string('table', None, 'Write the base-size models on 64 TPU v4 chips to this Markdown file.')
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 32_000, 'Vocabulary.', lower_bound=1)


def main() -> None:
    """Compiles, once or in a sweep."""
    from gau.benchmarks import breakdown, chips, compile_check, tpu_table
    from gau.training import mesh as meshes

    rows, whole_table = cli.output_file('json'), cli.output_file('table')
    if whole_table:
        own = 'it has its own configs and machine'
        cli.refuse(
            *('config', 'topology', 'sweep', 'shardings', 'breakdown', 'json', 'vocab_size'),
            beside='table',
            because=own,
        )
        tpu_table.write(whole_table, report=lambda line: print(line, flush=True))
        return
    config = flags.FLAGS.config
    if _BREAKDOWN.value and (_SWEEP.value is not None or _SHARDINGS.value):
        raise UserError('--breakdown goes with one compilation, not with --sweep or --shardings')
    if _SHARDINGS.value:
        cli.refuse('sweep', 'json', beside='shardings', because='nothing is compiled')
    if config is None:
        raise UserError('--config=FILE[:name=value,...] must be given, or --table=FILE')
    compile_check.without_data(config)
    target = chips.target(_TOPOLOGY.value)
    idle = meshes.idle(meshes.make_mesh(config.mesh, target.devices).size, len(target.devices))
    if idle:
        warn(idle)

    def keep(row: dict) -> None:
        if rows:
            with rows.open('a') as file:
                file.write(json.dumps(row) + '\n')

    if _SHARDINGS.value:
        print(compile_check.shardings(config, target, vocab_size=_VOCAB_SIZE.value), end='')
        return
    if _SWEEP.value is None:
        found = compile_check.check(config, target, vocab_size=_VOCAB_SIZE.value)
        keep(found.row)
        print(compile_check.describe(found))
        if _BREAKDOWN.value and found.program is not None:
            print('\n' + breakdown.describe(found.program, target.chip.clock if target.chip else None))
        return

    def report(row: dict) -> None:
        keep(row)
        print(f'batch {row["batch_size"]} x {row["context"]}: {compile_check.verdict(row)}', flush=True)

    largest = compile_check.sweep(config, _SWEEP.value, target, vocab_size=_VOCAB_SIZE.value, report=report)
    print(f'largest {_SWEEP.value}: {largest[0] if largest else "none fits"}')


if __name__ == '__main__':
    cli.define_config(required=False)
    cli.run(main)
