"""Cuts labelled documents into passages to classify: the labels with most text, whole documents held out.

    python scripts/cut_passages.py --source='jsonl:books/*.jsonl' --label_field=author --output=data/authors

Writes train.jsonl and valid.jsonl (`label`, `text`, which configs/finetune.py reads) and report.json, which says how
many documents each label has in both. Documents of --held_out are never trained on; where they are too few, the
shortest documents of a label join them. The beginning and the end of a document are left out.
"""

from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli

_SOURCE = flags.DEFINE_string('source', None, 'JSON lines, as jsonl:GLOB.', required=True)
_HELD_OUT = flags.DEFINE_string('held_out', None, 'JSON lines of documents that are not trained on.')
_OUTPUT = flags.DEFINE_string('output', None, 'Directory to make.', required=True)
_LABEL = flags.DEFINE_string('label_field', 'label', 'Field of a line that is the label.')
_TEXT = flags.DEFINE_string('text_field', 'text', 'Field of a line that is the text.')
_CLASSES = flags.DEFINE_integer('classes', 20, 'How many labels, those with most text.', lower_bound=2)
_LEFT_OUT = flags.DEFINE_list('left_out', [], 'Labels that are none, such as Various.')
_CHARACTERS = flags.DEFINE_integer('characters', 4000, 'Length of a passage.', lower_bound=1)
_TRAIN = flags.DEFINE_integer('train', 400, 'Passages of each label to train on.', lower_bound=1)
_VALID = flags.DEFINE_integer('valid', 60, 'Passages of each label to hold out.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Which passages are taken.', lower_bound=0)


def main() -> None:
    """Writes the files."""
    from gau.data import passages

    report = passages.write(
        Path(_OUTPUT.value),
        source=_SOURCE.value,
        held_out=_HELD_OUT.value,
        label_field=_LABEL.value,
        text_field=_TEXT.value,
        classes=_CLASSES.value,
        left_out=_LEFT_OUT.value,
        characters=_CHARACTERS.value,
        train=_TRAIN.value,
        valid=_VALID.value,
        seed=_SEED.value,
    )
    for label, splits in report.items():
        counts = ', '.join(
            f'{split} {found["passages"]} of {found["documents"]} documents' for split, found in splits.items()
        )
        print(f'{label}: {counts}')


if __name__ == '__main__':
    cli.run(main)
