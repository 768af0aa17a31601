"""Trains a few steps of a config over several meshes of the devices at hand; compares losses, speed and memory.

    python scripts/benchmark_meshes.py --config=configs/lm.py:size=base,context=8192 --meshes=1x1x1x1,1x2x1x1,1x1x1x2

A mesh is data x fsdp x tensor x sequence. The first one is what the others are compared with.
"""

import json

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.errors import UserError

cli.define_config()
_MESHES = flags.DEFINE_list('meshes', None, 'Meshes, comma separated, such as 1x1x1x1,1x2x1x1.', required=True)
_STEPS = flags.DEFINE_integer('steps', 20, 'Training steps over each.', lower_bound=5)


def main() -> None:
    """Prints a line for each mesh, then one of JSON."""
    for field in cli.overrides():
        if field.startswith('mesh.') or field in ('fork', 'init_from'):
            does = '--meshes says which' if field.startswith('mesh.') else 'parameters are drawn'
            raise UserError(f'--config.{field} does nothing here: {does}')
    config = cli.load_config()
    shapes = [_shape(text) for text in _MESHES.value or ['']]
    # Imported late, so that --help and a mistyped flag answer at once.
    from gau.benchmarks.meshes import train_over

    columns = f'{"mesh":12} {"attention":10} {"last loss":>10} {"max diff":>9} {"norm":>11}'
    print(f'{columns} {"ms/step":>8} {"tokens/s":>9} GiB')
    results = []
    for found in train_over(config, shapes, steps=_STEPS.value):
        results.append(found)
        memory = '-' if found.peak_bytes is None else f'{found.peak_bytes / 2**30:.1f}'
        print(
            f'{"x".join(map(str, found.mesh)):12} {found.impl:10} {found.losses[-1]:10.5f} '
            f'{found.difference(results[0]):9.1e} {found.parameter_norm:11.5f} {found.step_ms:8.1f} '
            f'{found.tokens_per_second:9,.0f} {memory}',
            flush=True,
        )
    print(json.dumps([vars(found) for found in results]))


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.split('x')
    if len(sizes) != 4 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise UserError(f'--meshes: "{text}" is not four sizes such as 1x2x1x1 (data x fsdp x tensor x sequence)')
    return tuple(map(int, sizes))


if __name__ == '__main__':
    cli.run(main)
