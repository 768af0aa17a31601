"""Writes losses.json anew, or prints the losses of the cases that are named: see the package's docstring."""

import json
import os
import sys

from tests.training import golden

# Whatever the tests around it are compiled with.
os.environ['XLA_FLAGS'] = ''


def main(cases: list[str]) -> None:
    """Trains every case and writes the file; or only `cases`, objective/model each, and prints them."""
    losses = {}
    for objective, name in [case.split('/') for case in cases] or golden.CASES:
        losses[f'{objective}/{name}'] = values = golden.losses(objective, name)
        print(f'{objective}/{name}: {values[0]:.4f} -> {values[-1]:.4f}', flush=True)
    if cases:
        print(json.dumps(losses))
        return
    record = {'environment': golden.environment(), 'corpus': golden.corpus(), 'losses': losses}
    golden.PATH.write_text(json.dumps(record, indent=1) + '\n')
    print(f'written: {golden.PATH}')


if __name__ == '__main__':
    main(sys.argv[1:])
