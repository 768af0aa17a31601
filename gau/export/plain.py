"""`--format=safetensors`: weights, the model's config, the tokenizer's own file and a model card."""

from pathlib import Path

from gau.export import card, tokenizer_files
from gau.export.exporting import CONFIG, KIND, Trained, write_json, write_weights
from gau.training.workdir import config_to_dict

USE = """\
```python
from safetensors.numpy import load_file

weights = load_file('model.safetensors')  # NumPy arrays by name; the model's config is in config.json
```

A new run starts from these parameters with `python train.py --config=... --workdir=... --init_from=DIRECTORY`.
Dense layers are laid out as PyTorch's `nn.Linear`: [outputs, inputs].
"""


def write(trained: Trained, directory: Path) -> None:
    """Writes the format into a directory."""
    config, tokenizer = trained.run.config, trained.run.tokenizer
    write_weights(trained, directory)
    write_json(
        directory / CONFIG,
        {
            'format': KIND,
            'objective': config.objective,
            'causal': trained.causal,
            'context': config.data.context,
            'vocab_size': tokenizer.vocab_size,
            'model': config_to_dict(config.model),
            'tokenizer': tokenizer_files.describe(tokenizer),
        },
    )
    tokenizer_files.copy(tokenizer, directory)
    card.write(trained, directory, format='safetensors', use=USE, library='gau')
