"""Stands in for train.py where a test is of the sweep and not of the run: the same files, flags and exit codes.

A learning rate of 13 fails always, one of 7 the first time, one of 5 is bad input; with one of 11 the loss diverges.
With FAKE_HOLD=3 it stays at step 3 until it is stopped, or until there is a file `release` in the directory of the
sweep.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from absl import flags

from gau import cli
from gau.data import tokenizers
from gau.errors import UserError
from gau.training import workdir as files

cli.define_config()
flags.DEFINE_string('workdir', None, 'as train.py')


def main() -> int:
    config = cli.load_config()
    workdir = Path(flags.FLAGS.workdir)
    stopped = []
    hold = int(os.environ.get('FAKE_HOLD', '0'))
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    if config.optimizer.learning_rate == 5:
        raise UserError('learning rate 5 is bad input')
    with files.claim(workdir, config):
        files.keep_config(workdir, config)
        (workdir / '.pid').write_text(str(os.getpid()))
        rows = files.read_metrics(workdir / files.METRICS)
        starts = workdir / '.starts'
        starts.write_text(starts.read_text() + 'x' if starts.exists() else 'x')
        if config.optimizer.learning_rate == 13 or (
            config.optimizer.learning_rate == 7 and len(starts.read_text()) == 1
        ):
            raise RuntimeError('as it should')
        if config.optimizer.learning_rate == 11:
            files.write_json(workdir / files.DIVERGED, {'step': 4, 'error': 'loss nan'})
            print('error: loss nan', file=sys.stderr)
            return 1
        with (workdir / files.METRICS).open('a') as file:
            for step in range(len(rows) + 1, config.steps + 1):
                row = {'step': step, 'split': 'train', 'loss': loss(config, step)}
                row |= {'tokens_per_second': 1000.0, 'step_seconds': 0.1}
                file.write(json.dumps(row) + '\n')
                file.flush()
                while step == hold and not stopped and not (workdir.parent / 'release').exists():
                    time.sleep(0.02)
                if stopped:
                    print(f'saved at step {step}')
                    return 143
        final = {'step': config.steps, 'eval': {'valid': {'loss': loss(config, config.steps)}}}
        final |= {'device': 'none', 'versions': {}, 'parameters': 1, 'flops_per_token': 1.0}
        final |= {'data': {'tokenizer': tokenizers.load(config.data.tokenizer).fingerprint}}
        files.write_json(workdir / files.FINAL, final)
    return 0


def loss(config, step: int) -> float:
    return 5 / step + config.model.chunk_size / 100 + config.seed / 1000


if __name__ == '__main__':
    cli.run(main)
