"""Writes text with a trained model. The state has a constant size with FLASH (up to one far chunk), Performer and
MC-TFM++.

    python scripts/sample.py --workdir=DIR --prompt='Once upon' --max_tokens=512 --temperature=0.8 --top_p=0.95
    python scripts/sample.py --workdir=DIR --prompt_file=chapter.txt --num=4 --json
    python scripts/sample.py --workdir=DIR --interactive
    python scripts/sample.py --workdir=DIR --prompts=prompts.jsonl > texts.jsonl
    python scripts/sample.py --workdir=DIR --prompt_file=book.txt --save_state=book.state --max_tokens=0
    python scripts/sample.py --workdir=DIR --state=book.state --prompts=questions.jsonl

One text is printed as it is written; several are printed one after the other when they are done. The same seed writes
the same text. `--prompts` has a JSON object with a "prompt" in each line, and is answered in the same order. `--state`
goes on from what `--save_state` read before, so that a long document is read once. At the end speeds go to stderr: of
reading, with the compiler's time if the program is new; of writing, without the first block of 32 tokens.
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
flags.DEFINE_string('prompts', None, 'File of JSON lines, each with a "prompt"; prints JSON lines in the same order.')
flags.DEFINE_integer('batch_size', 8, 'Of --prompts: how many are continued side by side.', lower_bound=1)
flags.DEFINE_integer(
    'devices', 1, 'Spread what is side by side over so many devices, all parameters on each.', lower_bound=1
)
flags.DEFINE_integer(
    'tensor', 1, 'Split every layer and its state over so many devices, without our kernels.', lower_bound=1
)
flags.DEFINE_string('state', None, 'File of --save_state, whose text is continued.')
flags.DEFINE_string('save_state', None, 'File to write the state after the prompt to.')
flags.DEFINE_integer('num', 1, 'How many continuations to write, side by side.', lower_bound=1, upper_bound=2**16)
flags.DEFINE_integer('max_tokens', 256, 'Tokens to write at most; 0: only read, for --save_state.', lower_bound=0)
flags.DEFINE_float('temperature', 0.8, '0 takes the likeliest token each time.', lower_bound=0.0)
flags.DEFINE_integer('top_k', 0, 'Draw from the k likeliest tokens only; 0: from all.', lower_bound=0)
flags.DEFINE_float('top_p', 1.0, 'Draw from the likeliest tokens that have this probability together.')
flags.DEFINE_integer('seed', 0, 'Of the draws.')
flags.DEFINE_multi_string('stop', [], 'End where this text would be written; may be given several times.')
flags.DEFINE_boolean('json', False, 'Print one JSON object for each continuation instead of text.')
flags.DEFINE_boolean('interactive', False, 'Continue one line of the terminal after another; an empty line ends.')


def main() -> None:
    """Reads the prompts and writes what the model makes of them."""
    prompts = _prompts()
    from gau.models import decoding
    from gau.sampling import generation, rows, saved_states
    from gau.training.load import load_run

    sampling = generation.SamplingParams(flags.FLAGS.temperature, flags.FLAGS.top_k, flags.FLAGS.top_p)
    generation.check(sampling, seed=flags.FLAGS.seed)
    if flags.FLAGS.save_state:
        saved_states.check_new(flags.FLAGS.save_state)
    rows.check((flags.FLAGS.batch_size if flags.FLAGS.prompts else 1) * flags.FLAGS.num, flags.FLAGS.devices)
    rows.check_tensor(flags.FLAGS.tensor)
    run, params, _ = load_run(flags.FLAGS.workdir, step=flags.FLAGS.step, tensor=flags.FLAGS.tensor)
    decoding.check(run.model)
    if run.config.quantization != 'none':
        raise UserError(
            f'quantization={run.config.quantization} is not decoded; scripts/compress.py --method=rounded makes of it '
            'a run with weights of 8 bits, which is'
        )
    start = saved_states.load(flags.FLAGS.state, run.model, params) if flags.FLAGS.state else None
    speed = _Speed()
    if flags.FLAGS.interactive:
        while prompt := _line():
            _write(run, params, [prompt], start, sampling, speed)
            speed.tell()
        return
    size = flags.FLAGS.batch_size
    for first in range(0, len(prompts), size):
        _write(run, params, prompts[first : first + size], start, sampling, speed, first=first)
    speed.tell()


def _prompts() -> list[str]:
    ways = ('prompt', 'prompt_file', 'prompts', 'interactive')
    given = [name for name in ways if flags.FLAGS[name].value]
    if len(given) > 1:
        raise UserError(f'give one of --{given[0]} and --{given[1]}')
    if flags.FLAGS.save_state and given[-1:] in (['prompts'], ['interactive']):
        raise UserError(f'--save_state is of one prompt, and --{given[0]} has several')
    if flags.FLAGS.devices > 1 and flags.FLAGS.tensor > 1:
        raise UserError('give one of --devices, which spreads sequences, and --tensor, which splits layers')
    if not flags.FLAGS.max_tokens and not flags.FLAGS.save_state:
        raise UserError('--max_tokens=0 writes nothing: it is of --save_state')
    cli.refuse_without('batch_size', beside=('prompts',))
    if '' in flags.FLAGS.stop:
        raise UserError('--stop= names no text')
    drawn = ('top_k', 'top_p', 'seed')
    if not flags.FLAGS.max_tokens:
        nothing = 'nothing is written'
        cli.refuse(*('temperature', *drawn, 'num', 'stop', 'json'), beside='max_tokens=0', because=nothing)
    if not flags.FLAGS.temperature:
        cli.refuse(*drawn, beside='temperature=0', because='the likeliest token is taken each time')
    if flags.FLAGS.prompts:
        return _prompts_of_lines(flags.FLAGS.prompts)
    return [plain.read_text(flags.FLAGS.prompt_file) if flags.FLAGS.prompt_file else flags.FLAGS.prompt or '']


def _prompts_of_lines(path: str) -> list[str]:
    prompts = []
    # Not splitlines: JSON may have line separators of Unicode inside a string.
    for number, line in enumerate(plain.read_text(path).split('\n'), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f'{path}:{number} is no JSON: {error}') from error
        if not isinstance(record, dict) or not isinstance(record.get('prompt'), str):
            raise UserError(f'{path}:{number} has no "prompt" that is a string')
        prompts.append(record['prompt'])
    if not prompts:
        raise UserError(f'{path} has no prompts')
    return prompts


def _line() -> str:
    try:
        return input('> ')
    except (EOFError, KeyboardInterrupt):
        return ''


class _Speed:
    """Counts tokens and seconds of reading, and of all blocks that were written but the first of each batch."""

    def __init__(self):
        self.counts = {'read': [0, 0.0], 'wrote': [0, 0.0], 'wrote at first': [0, 0.0]}

    def add(self, what: str, tokens: int, started: float) -> None:
        """Counts so many tokens since a time."""
        count = self.counts[what]
        count[0] += tokens
        count[1] += time.perf_counter() - started

    def tell(self) -> None:
        """Prints the speeds, and begins anew."""
        read, first, later = (self.counts[what] for what in ('read', 'wrote at first', 'wrote'))
        parts = []
        if read[0]:
            parts.append(f'read {read[0]} tokens at {read[0] / read[1]:.0f} tokens/s, compiling included')
        if later[0]:
            rate = later[0] / later[1]
            parts.append(f'wrote {first[0] + later[0]} tokens, after the first {first[0]} at {rate:.0f} tokens/s')
        elif first[0]:
            parts.append(f'wrote {first[0]} tokens at {first[0] / first[1]:.0f} tokens/s, compiling included')
        print('; '.join(parts), file=sys.stderr)
        self.__init__()


def _write(run, params, prompts: list[str], start, sampling, speed: _Speed, *, first: int = 0) -> None:
    """Prints the continuations of prompts, of which `first` stood before."""
    import jax
    import numpy as np

    from gau.sampling import generation, saved_states
    from gau.sampling.detokenizer import Detokenizer

    num, max_tokens = flags.FLAGS.num, flags.FLAGS.max_tokens
    as_json = flags.FLAGS.json or flags.FLAGS.prompts
    live = num == len(prompts) == 1 and max_tokens and not as_json
    # The last batch is filled up with prompts whose texts nobody reads.
    devices, real = flags.FLAGS.devices, len(prompts)
    while len(prompts) * num % devices:
        prompts = [*prompts, prompts[-1]]
    begin = [] if start else [run.tokenizer.bos_id]
    tokens = [np.concatenate([begin, run.tokenizer.encode(prompt)]).astype(np.int32) for prompt in prompts]
    if live:
        print(prompts[0], end='', flush=True)
    started = time.perf_counter()
    # One prompt for several rows is read as the parameters lie.
    spread = {'devices': 1 if len(prompts) % devices else devices}
    fields = {'max_tokens': max_tokens, 'start': start and start.repeated(run.model, len(prompts)), **spread}
    prefilled = jax.block_until_ready(generation.prefill(run.model, params, tokens, **fields))
    speed.add('read', sum(map(len, tokens[:real])), started)
    if flags.FLAGS.save_state:
        saved_states.save(flags.FLAGS.save_state, run.model, params, prefilled)
    if not max_tokens:
        return
    texts = [
        Detokenizer(run.tokenizer, before=row if start else row[1:], stop=flags.FLAGS.stop)
        for row in tokens[:real]
        for _ in range(num)
    ]
    fields = {'max_tokens': max_tokens, 'sampling': sampling, 'seed': flags.FLAGS.seed}
    fields |= {'first_row': first * num, 'devices': devices}
    blocks = generation.decode(run.model, params, prefilled.repeated(run.model, num), **fields)
    started, what = time.perf_counter(), 'wrote at first'
    for block in blocks:
        block = block[: len(texts)]
        speed.add(what, block.size, started)
        for text, row in zip(texts, block, strict=True):
            new = text.push(row)
            if live:
                print(new, end='', flush=True)
        if all(text.finished for text in texts):
            break
        started, what = time.perf_counter(), 'wrote'
    for number, text in enumerate(texts):
        prompt, rest = prompts[number // num], text.close()
        if as_json:
            record = {'prompt': prompt, 'text': text.text, 'tokens': text.tokens, 'finished': text.finished}
            print(json.dumps(record, ensure_ascii=False), flush=True)
        else:
            print(rest if live else prompt + text.text)


if __name__ == '__main__':
    cli.run(main)
