"""The end of the quickstart: a sample, and five lines: what was reached, against what, where it lies, what is next."""

import bz2
import lzma
import sys
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli, strict_json
from gau.errors import UserError

flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)

PROMPT = 'def read_lines(path):\n    """'


def main() -> None:
    """Prints the sample and the five lines."""
    from gau.data import embedded
    from gau.sampling import generation
    from gau.training.load import load_run

    workdir = Path(flags.FLAGS.workdir)
    run, params, step = load_run(workdir)
    try:
        result = strict_json.loads((workdir / 'eval.jsonl').read_text().splitlines()[-1])
        parameters = strict_json.loads((workdir / 'final.json').read_text())['parameters']
        ours, held_out = result['bits_per_byte'], result['bytes']
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise UserError(f'--workdir={workdir} is no quickstart that was trained and evaluated: {error!r}') from error
    written = generation.sample(
        run.model,
        params,
        run.tokenizer.encode(PROMPT),
        bos_id=run.tokenizer.bos_id,
        max_tokens=160,
        temperature=0.7,  # at 0.5 so small a model repeats itself, or writes spaces
        seed=0,
    )
    print(f'\nA sample, continuing {PROMPT!r}:\n{PROMPT}{run.tokenizer.decode(written[0])}\n')
    texts = [text.encode() for _, text in embedded.split_text('valid')]
    together = b''.join(texts)
    size = len(together)
    bits = {
        'bz2 -9': 8 * len(bz2.compress(together, 9)) / size,
        'xz -9': 8 * len(lzma.compress(together, preset=9)) / size,
        'bz2 -9 file by file': 8 * sum(len(bz2.compress(text, 9)) for text in texts) / size,
    }
    print(
        f'1. Result: {parameters:,} parameters, {step} steps, {ours:.3f} bits per byte on {held_out:,} bytes '
        'of source that it never saw.'
    )
    print('2. Compared with: ' + ', '.join(f'{name} {value:.3f}' for name, value in bits.items()) + ' bits per byte.')
    print(f'3. Checkpoint: {workdir}/checkpoints/{step}')
    print(f'4. Metrics: {workdir}/metrics.jsonl; plots: {workdir}/plots/loss.png, {workdir}/plots/loss_by_position.png')
    # The quickstart makes .venv where no environment with the requirements is active.
    python = '.venv/bin/python' if Path(sys.prefix) == Path.cwd() / '.venv' else 'python'
    print(f'5. Next: {python} scripts/sample.py --workdir={workdir} --prompt="class ", or README.md')


if __name__ == '__main__':
    cli.run(main)
