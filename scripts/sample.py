"""Writes text with a trained model, with a state of constant size where the model has one (FLASH, Performer, MC-TFM++).

    python scripts/sample.py --workdir=DIR --prompt='Once upon' --max_tokens=512 --temperature=0.8 --top_p=0.95
    python scripts/sample.py --workdir=DIR --prompt_file=chapter.txt --num=4 --json
    python scripts/sample.py --workdir=DIR --interactive

One text is printed as it is written; several, one after the other when they are done. The same seed writes the same
text. Tokens a second go to stderr at the end (of all blocks of 32 but the first, which waits for the compiler).
"""

import json
import sys
import time

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.data import plain
from gau.errors import UserError

flags.DEFINE_string('workdir', None, 'Directory of the run.', required=True)
flags.DEFINE_integer('step', None, 'Step of the checkpoint; the newest by default.')
flags.DEFINE_string('prompt', None, 'Text to continue.')
flags.DEFINE_string('prompt_file', None, 'UTF-8 file with the text to continue.')
flags.DEFINE_integer('num', 1, 'How many continuations to write.', lower_bound=1)
flags.DEFINE_integer('max_tokens', 256, 'Tokens to write at most.', lower_bound=1)
flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token each time.', lower_bound=0.0)
flags.DEFINE_integer('top_k', 0, 'Draw from the k likeliest tokens only; 0: from all.', lower_bound=0)
flags.DEFINE_float('top_p', 1.0, 'Draw from the likeliest tokens that have this probability together.')
flags.DEFINE_integer('seed', 0, 'Of the draws.')
flags.DEFINE_multi_string('stop', [], 'End where this text would be written; may be given several times.')
flags.DEFINE_boolean('json', False, 'Print one JSON object for each continuation instead of text.')
flags.DEFINE_boolean('interactive', False, 'Continue one line of the terminal after another; an empty line ends.')


def main() -> None:
    """Reads the prompt and writes what the model makes of it."""
    prompt = _prompt()
    from gau.models import decoding
    from gau.sampling import generation
    from gau.training.load import load_run

    sampling = generation.SamplingParams(flags.FLAGS.temperature, flags.FLAGS.top_k, flags.FLAGS.top_p)
    generation.check(sampling, seed=flags.FLAGS.seed)
    run, params, _ = load_run(flags.FLAGS.workdir, step=flags.FLAGS.step)
    decoding.check(run.model)
    if not flags.FLAGS.interactive:
        return _write(run, params, prompt, sampling)
    while prompt := _line():
        _write(run, params, prompt, sampling)


def _prompt() -> str:
    given = [name for name in ('prompt', 'prompt_file', 'interactive') if flags.FLAGS[name].value]
    if len(given) > 1:
        raise UserError(f'give one of --{given[0]} and --{given[1]}')
    if not flags.FLAGS.prompt_file:
        return flags.FLAGS.prompt or ''
    return plain.read_text(flags.FLAGS.prompt_file)


def _line() -> str:
    try:
        return input('> ')
    except (EOFError, KeyboardInterrupt):
        return ''


def _write(run, params, prompt: str, sampling) -> None:
    """Prints the continuations of one prompt."""
    import numpy as np

    from gau.sampling import generation
    from gau.sampling.detokenizer import Detokenizer

    tokens = np.concatenate([[run.tokenizer.bos_id], run.tokenizer.encode(prompt)]).astype(np.int32)
    num, live = flags.FLAGS.num, flags.FLAGS.num == 1 and not flags.FLAGS.json
    texts = [Detokenizer(run.tokenizer, before=tokens[1:], stop=flags.FLAGS.stop) for _ in range(num)]
    blocks = generation.generate(
        run.model,
        params,
        [tokens] * num,
        max_tokens=flags.FLAGS.max_tokens,
        sampling=sampling,
        seed=flags.FLAGS.seed,
    )
    if live:
        print(prompt, end='', flush=True)
    begun, started, first, counted, seconds = time.perf_counter(), None, 0, 0, 0.0
    for block in blocks:
        if started is not None:
            counted, seconds = counted + block.size, time.perf_counter() - started
        else:
            first, started = block.size, time.perf_counter()
        for text, row in zip(texts, block, strict=True):
            new = text.push(row)
            if live:
                print(new, end='', flush=True)
        if all(text.finished for text in texts):
            break
    for text in texts:
        rest = text.close()
        if flags.FLAGS.json:
            record = {'prompt': prompt, 'text': text.text, 'tokens': text.tokens, 'finished': text.finished}
            print(json.dumps(record, ensure_ascii=False))
        else:
            print(rest if live else prompt + text.text)
    # The first block waits for the prompt and the compiler; speed is that of the others, if there are any.
    about = ''
    if not counted:
        counted, seconds, about = first, started - begun, ', reading the prompt and compiling included'
    print(f'{counted / seconds:.0f} tokens/s over {counted} tokens{about}', file=sys.stderr)


if __name__ == '__main__':
    cli.run(main)
