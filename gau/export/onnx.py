"""`--format=onnx`: the forward pass with free batch and length, and FLASH's decoding step with its state.

Both graphs are made of the PyTorch file of `--format=huggingface`, and hold the parameters in float32.
"""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gau.export import card, tokenizer_files
from gau.export.exporting import CONFIG, KIND, Trained, write_json
from gau.export.huggingface import config_of, has_state

FORWARD, DECODE = 'model.onnx', 'decode.onnx'

USE = """\
```python
import numpy as np, onnxruntime

ids = np.array([TOKENS], np.int64)  # [B, N], of any size
model = onnxruntime.InferenceSession('model.onnx')
places = {'segment_ids': np.ones_like(ids), 'position_ids': np.arange(ids.shape[1])[None].repeat(len(ids), 0)}
(logits,) = model.run(None, {'input_ids': ids, **places})  # float32 [B, N, V]
```

`segment_ids` are 0 at padding, else the number of the document; `position_ids` begin with each document.
The ids of special tokens are in `config.json`.
"""
USE_DECODE = """
One token of each row after another, with a state that does not grow:

```python
import json

decoder, shapes = onnxruntime.InferenceSession('decode.onnx'), json.load(open('config.json'))['state']
state = {name: np.zeros((len(ids), *shape), np.float32) for name, shape in shapes.items()}
for position in range(ids.shape[1]):
    here = {'input_ids': ids[:, position], 'position': np.full(len(ids), position)}
    logits, *new = decoder.run(None, here | state)  # float32 [B, V], for the token that follows
    state = dict(zip(state, new))
```
"""


def write(trained: Trained, directory: Path) -> None:
    """Writes the format into a directory.

    Raises:
      UserError: see `gau.export.huggingface.config_of`.
    """
    run, tokenizer = trained.run, trained.run.tokenizer
    config = config_of(
        run.config.model, vocab_size=tokenizer.vocab_size, causal=trained.causal, context=run.config.data.context
    )
    model = pytorch_model(config, trained.weights)
    shapes = write_graphs(model, directory)
    described = {'format': KIND, 'objective': run.config.objective, 'model': config}
    described |= {'tokenizer': tokenizer_files.describe(tokenizer), 'state': shapes}
    write_json(directory / CONFIG, described)
    tokenizer_files.copy(tokenizer, directory)
    card.write(trained, directory, format='onnx', use=USE + USE_DECODE * bool(shapes), library='onnx')


def pytorch_model(config: dict[str, Any], weights: dict[str, Any]) -> Any:
    """Returns the model of modeling_gau.py with these weights, in float32."""
    import torch

    from gau.export import modeling_gau

    kind = getattr(modeling_gau, config['architectures'][0])
    model = kind(modeling_gau.GAUConfig(**config)).eval()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()}, strict=True)
    return model.float()


def write_graphs(model: Any, directory: Path) -> dict[str, list[int]]:
    """Writes model.onnx and, for causal models with chunks, decode.onnx.

    Returns:
      The shapes of a row's state by name; none where there is no decode.onnx: the state of the other models
      grows with the sequence, or they have none.
    """
    import torch

    class Forward(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, segment_ids, position_ids):
            return self.model.head(self.model.hidden(input_ids, segment_ids, position_ids))

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, position, state):
            arrays = iter(state)
            layers = [{name: next(arrays) for name in layer} for layer in layers_of_state]
            h_B1D, new = self.model.step(input_ids[:, None], position, layers)
            flat = [layer[name] for layer, names in zip(new, layers_of_state, strict=True) for name in names]
            return self.model.head(h_B1D)[:, 0], *flat

    batch, length = torch.export.Dim('batch'), torch.export.Dim('length')
    tokens_BN = torch.zeros(2, 7, dtype=torch.long)
    _export(
        Forward().eval(),
        (tokens_BN, torch.ones_like(tokens_BN), torch.arange(7)[None].repeat(2, 1)),
        directory / FORWARD,
        inputs=['input_ids', 'segment_ids', 'position_ids'],
        outputs=['logits'],
        shapes=({0: batch, 1: length},) * 3,
    )
    if not has_state(model.config.to_dict()) or model.config.chunk_size is None:
        return {}
    with torch.no_grad():
        layers_of_state = model.prefill(tokens_BN, None)[1].layers
    state = {f'blocks.{i}.{name}': x for i, layer in enumerate(layers_of_state) for name, x in layer.items()}
    _export(
        Step().eval(),
        (tokens_BN[:, 0], torch.full((2,), 7), list(state.values())),
        directory / DECODE,
        inputs=['input_ids', 'position', *state],
        outputs=['logits', *(f'new.{name}' for name in state)],
        shapes=({0: batch}, {0: batch}, [{0: batch}] * len(state)),
    )
    return {name: list(x.shape[1:]) for name, x in state.items()}


def _export(module: Any, example: tuple, path: Path, *, inputs: list[str], outputs: list[str], shapes: Any) -> None:
    import torch

    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            *(module, example),
            dynamo=True,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            verbose=False,
        )
        # A graph of more than 2 GB has its parameters in a file beside it.
        program.save(str(path))


@contextmanager
def _quiet() -> Iterator[None]:
    """Context without the exporter's remarks, none of which is about this model."""
    logger = logging.getLogger('torch.onnx')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logger.setLevel(level)
