"""Writes text on four simulated devices, the rows spread and not; prints both."""

import json
import os

os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=4'

import numpy as np

from gau.sampling import generation
from gau.sampling.generation import SamplingParams
from tests.models import tiny

PROMPTS = [np.arange(1, n, dtype=np.int32) for n in (3, 9, 7, 2)]


def main() -> None:
    """Prints one line of JSON last."""
    written = {}
    # Of scanned layers the state's rows are cut along another dimension than its positions.
    model, params = tiny.make('flash', dtype='float32', layer_stack='scan', num_layers=1)
    for devices in (1, 4):
        prefilled = generation.prefill(model, params, PROMPTS, max_tokens=9, devices=devices)
        rows = prefilled.repeated(model, 2)
        fields = {'max_tokens': 9, 'sampling': SamplingParams(), 'seed': 1, 'block': 6, 'devices': devices}
        written[devices] = np.concatenate(list(generation.decode(model, params, rows, **fields)), axis=1).tolist()
    print(json.dumps(written))


if __name__ == '__main__':
    main()
