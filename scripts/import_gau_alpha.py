"""Makes a directory to start a run from of a model in GAU-alpha's layout, a BERT of softmax GAUs.

    python scripts/import_gau_alpha.py --source=GAU-alpha --tokenizer=huggingface:vocab.json --output=out/gau
    python train.py --config=configs/finetune.py:start=out/gau,data=jsonl:train.jsonl --workdir=runs/classified

Hidden states and logits are the original's; what has no counterpart is refused (gau/export/gau_alpha.py).
"""

from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli

_SOURCE = flags.DEFINE_string('source', None, 'Directory with config.json and weights.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'Directory to make.', required=True)
_TOKENIZER = flags.DEFINE_string('tokenizer', None, 'Its vocabulary, as huggingface:TOKENIZER_JSON.', required=True)


def main() -> None:
    """Converts, and says what the model is."""
    from gau.export import gau_alpha

    model = gau_alpha.convert(Path(_SOURCE.value), Path(_OUTPUT.value), tokenizer=_TOKENIZER.value)
    print(f'{_OUTPUT.value}: ' + ', '.join(f'{field}={value}' for field, value in model.items()))


if __name__ == '__main__':
    cli.run(main)
