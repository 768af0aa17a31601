"""Evaluates and samples the run in argv[1] on six simulated devices; prints the mesh, the loss and the tokens."""

import json
import os
import sys

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=6'

from gau.sampling import generation
from gau.training import evaluate
from gau.training.load import load_run


def main() -> None:
    """Prints one line of JSON last."""
    (cases,) = evaluate.evaluate(sys.argv[1]).values()
    run, params, _ = load_run(sys.argv[1])
    tokens = generation.sample(run.model, params, [1, 2], bos_id=256, max_tokens=4, temperature=0.0, seed=0)
    (metrics,) = cases.values()
    print(json.dumps({'mesh': dict(run.mesh.shape), 'loss': metrics['loss'], 'tokens': tokens.tolist()}))


if __name__ == '__main__':
    main()
