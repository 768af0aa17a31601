"""Trains a model: python train.py --config=configs/lm.py:model=flash,size=base --workdir=DIR [--config.field=value].

A work directory that holds a run of the same config is resumed. Exit codes: 0 done; 2 bad usage, config or data, in
one line on stderr; 130 / 143 interrupted by SIGINT / SIGTERM and saved; 1 anything else.
"""

import os
import sys

from absl import flags

from gau import cli

cli.define_config()
flags.DEFINE_string('workdir', None, 'Directory of the run: config, metrics, checkpoints, plots.', required=True)
flags.DEFINE_string('fork', None, 'Work directory of another run, whose newest checkpoint a new run starts from.')


def main() -> int:
    """Trains, and says in the exit code how it ended."""
    config = cli.load_config()
    if flags.FLAGS.fork is not None:
        config.fork = os.path.abspath(flags.FLAGS.fork)
    # Imported late, so that --help and a mistyped flag answer at once.
    from gau.training import loop

    try:
        loop.train(config, flags.FLAGS.workdir)
    except loop.Interrupted as interrupted:
        print(interrupted, file=sys.stderr)
        return interrupted.exit_code
    except loop.NotFinite as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    cli.run(main)
