"""Trains, evaluates and samples on so many simulated devices: WORKDIR DEVICES STEPS; prints mesh, loss and tokens."""

import json
import os
import sys

os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count={sys.argv[2]}'

from gau.sampling import generation
from gau.training import evaluate, loop
from gau.training.load import load_run
from tests.training.tiny import tiny_config

# Rows that 3, 5, 6, 7 and 8 devices can share.
ROWS = 840


def main() -> None:
    """Goes on with the run in WORKDIR, or begins it; prints one line of JSON last."""
    path, _, steps = sys.argv[1:]
    shape = {
        'model__num_layers': 1,
        'data__batch_size': ROWS,
        'data__context': 16,
        'mesh__data': -1,
        'optimizer__warmup_steps': 1,
    }
    loop.train(tiny_config(**shape, steps=int(steps), eval__every_steps=2), path)
    (cases,) = evaluate.evaluate(path).values()
    (metrics,) = cases.values()
    run, params, _ = load_run(path)
    tokens = generation.sample(run.model, params, [1, 2], bos_id=256, max_tokens=4, temperature=0.0, seed=0)
    print(json.dumps({'mesh': dict(run.mesh.shape), 'loss': metrics['loss'], 'tokens': tokens.tolist()}))


if __name__ == '__main__':
    main()
