"""Writes losses.json anew: see the package's docstring."""

import json

from tests.training import golden


def main() -> None:
    """Trains every case and writes the file."""
    losses = {}
    for objective, name in golden.CASES:
        losses[f'{objective}/{name}'] = values = golden.losses(objective, name)
        print(f'{objective}/{name}: {values[0]:.4f} -> {values[-1]:.4f}', flush=True)
    record = {'environment': golden.environment(), 'corpus': golden.corpus(), 'losses': losses}
    golden.PATH.write_text(json.dumps(record, indent=1) + '\n')
    print(f'written: {golden.PATH}')


if __name__ == '__main__':
    main()
