"""The model card: what a model was trained on and for how long, how good it is, and with what it was made."""

import subprocess
from pathlib import Path
from typing import Any

from gau.export.exporting import CARD, TRAINING_CONFIG, Trained
from gau.training import workdir as files
from gau.training.checkpoints import count_parameters
from gau.training.config import library_versions

ROOT = Path(__file__).resolve().parents[2]


def write(trained: Trained, directory: Path, *, format: str, use: str, library: str) -> None:
    """Writes README.md.

    Args:
      trained: what is exported.
      directory: where to.
      format: that of the export.
      use: how the files beside it are opened, as Markdown.
      library: whose models these are, for the tables of the hub.
    """
    run, step = trained.run, trained.step
    config = run.config
    task = 'next-token prediction (causal)' if trained.causal else 'prediction of masked tokens (bidirectional)'
    facts = {
        'model': f'{config.model.name}, {count_parameters(run.abstract_params):,} parameters',
        'trained for': task,
        'training data': f'{config.data.source}, identity {_identity(run.data_identity)}',
        'tokenizer': f'{config.data.tokenizer}, {run.tokenizer.vocab_size:,} tokens',
        'context in training': f'{config.data.context:,} tokens',
        'training': f'{step:,} steps of {run.tokens_per_step:,} places: {step * run.tokens_per_step:,} tokens',
        'computed in': config.model.dtype,
        **_losses(trained),
        'made by': f'the repository gau, commit {_commit()}; '
        + ', '.join(f'{name} {version}' for name, version in library_versions().items()),
        'config of the run': f'[{TRAINING_CONFIG}]({TRAINING_CONFIG}), all fields',
    }
    table = '\n'.join(f'| {name} | {value} |' for name, value in facts.items())
    (directory / CARD).write_text(
        f"""\
---
license: apache-2.0
library_name: {library}
tags: [gau, {config.model.name.replace('_', '-')}]
---

# {config.model.name} ({config.model.size}) on {config.data.source}

| what | this model |
|---|---|
{table}

The licence is that of the code; whether the training data asks for another is for whoever publishes the weights to say.
The model repeats what is in its data, and nothing has been done about that.

## Use

{use}
## How it was made

Trained by `train.py` with the config in {TRAINING_CONFIG}, then

```bash
python scripts/export.py --workdir={trained.workdir.name} --step={step} --output=... --format={format}
```

The model is that of Hua, Dai, Liu and Le, Transformer Quality in Linear Time (arXiv 2202.10447), as the repository
`gau` implements it.
""",
        encoding='utf-8',
    )


def _identity(identity: dict[str, str]) -> str:
    return ', '.join(f'{name} {value}' for name, value in sorted(identity.items()) if name != 'tokenizer') or 'unknown'


def _losses(trained: Trained) -> dict[str, str]:
    """What was measured at this step; other steps say nothing about it."""
    rows = [row for row in files.read_metrics(trained.workdir / files.METRICS) if row['step'] == trained.step]
    return {
        f'loss, {row["split"]}': f'{row["loss"]:.4f} nats per target token'
        for row in rows
        if row.get('loss') is not None
    } or {'loss': 'not measured at this step'}


def _commit() -> str:
    git: list[Any] = ['git', '-C', ROOT, 'describe', '--always', '--dirty=+', '--abbrev=10', '--exclude=*']
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return 'unknown (not a clone)'
