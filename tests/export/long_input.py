"""Run by itself: reads a random input with an exported FLASH on the CPU; prints tokens, seconds and peak memory.

    python tests/export/long_input.py TOKENS

The model is a bidirectional and then a causal FLASH of two layers, D = 64, E = 128, S = 32, C = 256, V = 260.
"""

import importlib
import json
import resource
import sys
import time
import types
from pathlib import Path

import torch

CODE = Path(__file__).resolve().parents[2] / 'gau/export'
SIZES = {'num_layers': 2, 'model_dim': 64, 'expanded_dim': 128, 'query_key_dim': 32, 'vocab_size': 260}


def main() -> None:
    tokens = int(sys.argv[1])
    # As a package of its own, as `transformers` makes one of an exported directory: without JAX.
    sys.modules['exported'] = package = types.ModuleType('exported')
    package.__path__ = [str(CODE)]
    module = importlib.import_module('exported.modeling_gau')
    models = {
        'before': None,
        'masked': module.GAUForMaskedLM(module.GAUConfig(**SIZES, is_causal=False)).eval(),
        'causal': module.GAUForCausalLM(module.GAUConfig(**SIZES)).eval(),
    }
    input_ids = torch.randint(0, 256, (1, tokens), generator=torch.Generator().manual_seed(0))
    row = {'tokens': tokens}
    with torch.no_grad():
        for name, model in models.items():
            start = time.perf_counter()
            if model is not None:
                assert model(input_ids).logits.isfinite().all()
                row[f'{name}_seconds'] = round(time.perf_counter() - start, 1)
            row[f'{name}_MiB'] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps(row))


if __name__ == '__main__':
    main()
