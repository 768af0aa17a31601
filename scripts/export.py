"""Writes a trained model for use elsewhere: weights, a PyTorch model for `transformers`, or ONNX graphs.

    python scripts/export.py --workdir=DIR --output=OUT                        # safetensors
    python scripts/export.py --workdir=DIR --output=OUT --format=huggingface   # AutoModel...from_pretrained(OUT)
    python scripts/export.py --workdir=DIR --output=OUT --format=onnx          # model.onnx, decode.onnx

The libraries are those of requirements-export.txt; docs/deploy.md shows how the results are used.
"""

import _root  # noqa: F401
from absl import flags

from gau import cli

flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
flags.DEFINE_string('output', None, 'Directory to write; it must not exist, or be empty.', required=True)
flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.')
flags.DEFINE_string('format', 'safetensors', 'safetensors, huggingface or onnx.')


def main() -> None:
    """Exports, and says what lies where."""
    # Imported late: this imports JAX.
    from gau.export.exporting import export

    values = flags.FLAGS
    output = export(values.workdir, values.output, format=values.format, step=values.step)
    for path in sorted(output.iterdir()):
        print(f'{path}  {path.stat().st_size:,} bytes')


if __name__ == '__main__':
    cli.run(main)
