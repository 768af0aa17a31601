"""From a work directory to a directory that others can use: `export`, and what the formats have in common."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gau import outputs
from gau.errors import UserError, check_name
from gau.models.weights import named
from gau.training import workdir as files
from gau.training.setup import Run

# What each format imports besides requirements.txt.
FORMATS = {
    'safetensors': ('safetensors',),
    'huggingface': ('safetensors', 'transformers'),
    'onnx': ('safetensors', 'transformers', 'torch', 'onnx', 'onnxscript'),
}
WEIGHTS, CONFIG, TRAINING_CONFIG, CARD = 'model.safetensors', 'config.json', 'training_config.json', 'README.md'
KIND = 'gau-export-1'


class Trained(NamedTuple):
    """What is exported.

    Attributes:
      run: the run.
      workdir: its directory.
      step: of the checkpoint.
      weights: its parameters by their stable names (`gau.models.weights`).
    """

    run: Run
    workdir: Path
    step: int
    weights: dict[str, np.ndarray]

    @property
    def causal(self) -> bool:
        """Whether it predicts the next token; else hidden ones."""
        return self.run.model.causal


def export(workdir: str | Path, output: str | Path, *, format: str = 'safetensors', step: int | None = None) -> Path:
    """Writes a checkpoint as a directory of a format; whole or not at all.

    Args:
      workdir: of the run.
      output: directory to make; there must be none, or an empty one.
      format: a name of FORMATS.
      step: checkpoint; None means the newest.

    Returns:
      The directory.

    Raises:
      UserError: a library is missing, the directory holds something, there is no such checkpoint, or the format cannot
        hold the model.
    """
    check_name('--format', format, tuple(FORMATS))
    missing = [name for name in FORMATS[format] if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'--format={format} needs {", ".join(missing)}: pip install -r requirements-export.txt')
    output = Path(output)
    outputs.check_directory(output)
    write = _writer(format)
    trained = _open(Path(workdir), step)
    with outputs.directory(output) as aside:
        write_json(aside / TRAINING_CONFIG, files.config_to_dict(trained.run.config))
        write(trained, aside)
    return output


def _writer(format: str) -> Callable[[Trained, Path], None]:
    # Imported late: each has libraries of its own.
    if format == 'safetensors':
        from gau.export import plain as module
    elif format == 'huggingface':
        from gau.export import huggingface as module
    else:
        from gau.export import onnx as module
    return module.write


def _open(workdir: Path, step: int | None) -> Trained:
    from gau.models.language_model import LanguageModel
    from gau.training.load import load_run

    run, params, step = load_run(workdir, step=step)
    if not isinstance(run.model, LanguageModel):
        raise UserError(
            f'objective={run.config.objective} has a head of its own ({type(run.model).__name__}); language models '
            'are exported alone, of the objectives lm and mlm'
        )
    return Trained(run, workdir, step, named(params))


def write_weights(trained: Trained, directory: Path) -> None:
    """Writes the weights."""
    from safetensors.numpy import save_file

    # "pt" says that the layouts are PyTorch's; `transformers` asks for it.
    save_file(trained.weights, directory / WEIGHTS, metadata={'format': 'pt'})


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Writes an object as JSON for people."""
    path.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + '\n', encoding='utf-8')
