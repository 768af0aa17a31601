"""Trains a model: python train.py --config=configs/lm.py:model=flash,size=base --workdir=DIR [--config.field=value].

A work directory that holds a run of the same config is resumed. Exit codes: 0 done; 2 bad usage, config or data, in
one line on stderr; 130 / 143 interrupted by SIGINT / SIGTERM and saved; 1 anything else. A run over several processes
starts this program once in each, with the same arguments (scripts/launch/ has recipes); all of them end alike.
"""

import os
import sys

from absl import flags

from gau import cli

cli.define_config()
cli.define_processes()
flags.DEFINE_string('workdir', None, 'Directory of the run: config, metrics, checkpoints, plots.', required=True)
flags.DEFINE_string(
    'fork', None, 'Work directory of another run, or DIR/checkpoints/STEP: where a new run branches off.'
)
flags.DEFINE_string('init_from', None, 'Work directory, checkpoint or export: the parameters a new run starts with.')


def main() -> int:
    """Trains, and says in the exit code how it ended."""
    config = cli.load_config()
    for field in ('fork', 'init_from'):
        if flags.FLAGS[field].value is not None:
            config[field] = os.path.abspath(flags.FLAGS[field].value)
    # Imported late, so that --help and a mistyped flag answer at once.
    from gau.training import distributed, loop

    with cli.processes():
        try:
            loop.train(config, flags.FLAGS.workdir)
        except loop.Interrupted as interrupted:
            code, message = interrupted.exit_code, str(interrupted)
        except loop.NotFinite as error:
            code, message = 1, f'error: {error}'
        else:
            return 0
        if distributed.is_first():
            print(message, file=sys.stderr)
        return code


if __name__ == '__main__':
    cli.run(main)
