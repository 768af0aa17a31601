"""Run as a program by test_compile_check.py: the training step of FLASH with one text over 8 simulated devices, or 1.

Prints, as JSON, the row of the check and the shapes that cross devices.
"""

import json
import sys

from configs import lm, mlm
from gau.benchmarks import chips, compile_check


def main() -> None:
    """Compiles for objective, devices and context of the command line."""
    objective, devices, context = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    config = {'lm': lm, 'mlm': mlm}[objective].get_config('runlocal')
    config.model.update({'num_layers': 1, 'model_dim': 64, 'query_key_dim': 16, 'chunk_size': 128})
    config.data.update({'context': context, 'batch_size': 1})
    config.mesh.sequence = devices
    found = compile_check.check(config, chips.target(f'cpu:{devices}'), vocab_size=512)
    shapes = [array.shape for collective in found.collectives for array in collective.arrays]
    print(json.dumps(found.row | {'shapes': shapes}))


if __name__ == '__main__':
    main()
