"""Checks the kernels for TPUs on the TPU at hand and trains three models with and without them, in some minutes.

    python scripts/tpu_selftest.py

Ends in a block of text that is worth an issue, whatever it says: no kernel here has run on a TPU yet. On a machine
without a TPU the same runs tiny in Pallas' interpreter on the CPU, which proves the program and no speed.
"""

import importlib.metadata
import os

import _root  # noqa: F401

from gau import cli
from gau.errors import UserError


def main() -> None:
    """Prints a line for each kernel and each run, then all of it as a block."""
    import jax

    device = jax.devices()[0]
    if device.platform not in ('tpu', 'cpu'):
        raise UserError(f'the kernels are for TPUs, this is {device.platform}; JAX_PLATFORMS=cpu interprets them')
    if device.platform == 'cpu':
        os.environ['GAU_PALLAS_INTERPRET'] = '1'
    # Imported late, so that --help and a wrong machine answer at once.
    from configs import lm
    from gau.benchmarks import tpu_selftest

    sizes = tpu_selftest.CHIP if device.platform == 'tpu' else tpu_selftest.TINY
    lines, right = [], True

    def tell(line: str) -> None:
        lines.append(line)
        print(line, flush=True)

    tell(f'{jax.device_count()} x {device.device_kind}, {", ".join(_versions())}')
    if device.platform == 'cpu':
        tell('no TPU: tiny, in the interpreter')
    for check in tpu_selftest.check_kernels(sizes):
        right &= check.right
        tell(
            f'{check.name:32} {check.dtype:9} value {check.value:.1e} gradients {check.gradient:.1e} '
            f'{"right" if check.right else "WRONG"}'
        )
    for model, *runs in tpu_selftest.curves(sizes, lm.get_config):
        for run in runs:
            tell(
                f'{model:22} {run.impl:7} {run.step_ms:8.1f} ms {run.tokens_per_second:12,.0f} tokens/s, loss '
                f'{run.losses[0]:.4f} to {run.losses[-1]:.4f}'
            )
        apart = runs[1].difference(runs[0])
        close = apart < tpu_selftest.CURVES_TOLERANCE
        right &= close
        tell(f'{model:22} losses of both at most {apart:.1e} apart {"right" if close else "WRONG"}')
    tell('all right' if right else 'something is WRONG: please report it')
    print('\nTo paste into an issue:\n\n```\n' + '\n'.join(lines) + '\n```')
    if not right:
        raise UserError('a kernel is wrong on this device; model.impl=xla avoids all of them')


def _versions() -> list[str]:
    def version(package: str) -> str:
        try:
            return f'{package} {importlib.metadata.version(package)}'
        except importlib.metadata.PackageNotFoundError:
            return f'no {package}'

    return [version(package) for package in ('jax', 'jaxlib', 'libtpu', 'flax')]


if __name__ == '__main__':
    cli.run(main)
