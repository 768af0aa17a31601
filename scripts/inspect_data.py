"""Shows what a config feeds its model: sizes, lengths, packing, and decoded examples.

python scripts/inspect_data.py --config=configs/lm.py:data=jsonl:corpus/*.jsonl --plot=lengths.png
python scripts/inspect_data.py --config=configs/lm.py:data=jsonl:corpus/*.jsonl --chunks=128,256 \
    --paragraphs=blank_line,sentence --plot=chunks.png

With --chunks: only what chunks that end with a paragraph would cost (docs/results/text_chunks.md).
"""

from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.data import paragraphs, pipeline, report, sources, tokenizers
from gau.errors import UserError
from gau.objectives import objective as objectives
from gau.training import config as training_config

cli.define_config()
_SPLIT = flags.DEFINE_string('split', 'train', 'Split to survey')
_DOCUMENTS = flags.DEFINE_integer('documents', 2000, 'Documents to survey at most, spread evenly', lower_bound=1)
_EXAMPLES = flags.DEFINE_integer('examples', 2, 'Rows of the first batch to show', lower_bound=0)
_CHARACTERS = flags.DEFINE_integer('characters', 1500, 'Of each example, at most', lower_bound=1)
_PLOT = flags.DEFINE_string(
    'plot',
    'lengths.png',
    'Histogram of lengths to write (empty: none); with --chunks: empty places, if a file is given',
)
_OVERLAP = flags.DEFINE_boolean(
    'overlap', True, 'Look for the held-out documents among the training documents, all of which are read for that'
)
_CHUNKS = flags.DEFINE_list('chunks', None, 'Sizes of chunks that end with a paragraph, to count their padding')
_PARAGRAPHS = flags.DEFINE_list(
    'paragraphs', ['line'], f'What ends a paragraph of --chunks: {", ".join(paragraphs.ENDS)}'
)
_ROWS = 512


def main() -> None:
    """Prints the report."""
    sizes = cli.parse_positive_integers('chunks', _CHUNKS.value)
    unknown = [ends for ends in _PARAGRAPHS.value if ends not in paragraphs.ENDS]
    if unknown or not _PARAGRAPHS.value:
        raise UserError(f'--paragraphs={",".join(_PARAGRAPHS.value)}: choose from {", ".join(paragraphs.ENDS)}')
    if _PARAGRAPHS.present and sizes is None:
        raise UserError('--paragraphs says what chunks end with: it is of --chunks')
    if sizes:
        cli.refuse('examples', 'characters', 'overlap', beside='chunks', because='only padding is counted')
    if not _EXAMPLES.value:
        cli.refuse('characters', beside='examples=0', because='no example is shown')
    plot, config = cli.output_file('plot'), training_config.resolve(cli.load_config())
    data, objective = config.data, objectives.load(config.objective).rows
    tokenizer = tokenizers.load(data.tokenizer)
    print(f'source {data.source}, splits {", ".join(sources.splits(data))}')
    print(f'tokenizer {tokenizer.spec}, {tokenizer.vocab_size:,} ids, fingerprint {tokenizer.fingerprint}')
    if sizes:
        _print_chunks(data, tokenizer, sizes, plot if _PLOT.present else None)
        return
    found = report.survey(data, _SPLIT.value, tokenizer, at_most=_DOCUMENTS.value)
    kept = len(found.lengths)
    scale = found.documents / max(found.surveyed, 1)
    about = 'about ' if scale > 1 else ''
    print(f'\n{_SPLIT.value}: {found.documents:,} documents, {found.surveyed:,} surveyed, {found.left_out:,} left out')
    print(f'{about}{round(found.lengths.sum() * scale):,} tokens, {about}{round(found.n_bytes * scale):,} bytes')
    if kept and found.lengths.sum():
        print(
            f'{found.n_bytes / found.lengths.sum():.3f} bytes a token, '
            f'{found.lengths.sum() / max(found.n_words, 1):.3f} tokens a word, '
            f'{found.lengths.mean():,.0f} tokens a document'
        )
    if found.changed:
        print(
            f'the tokenizer changes {found.changed:,} of {kept:,} texts: bits per byte are then not of the whole text'
        )
    if _OVERLAP.value:
        _print_overlaps(data)
    print('\ntokens a document')
    print('\n'.join(report.histogram(found.lengths)))
    if plot:
        report.plot(found.lengths, data.context, plot)
        print(f'plot: {plot}')
    batches = _batches(config, tokenizer)
    packed = report.packing(batches)
    rows = sum(len(batch['inputs']) for batch in batches)
    print(
        f'\npacking {data.packing}, {rows:,} rows of {data.context:,}: {packed.filled:.2%} filled, '
        f'{packed.predicted:.2%} to predict'
        + (f', {packed.documents:.2f} documents or parts a row' if packed.documents else '')
    )
    for row in range(min(_EXAMPLES.value, len(batches[0]['inputs']))):
        text = report.render(batches[0], row, tokenizer, objective)
        print(f'\nexample {row + 1}\n{text[: _CHARACTERS.value]}{" ..." if len(text) > _CHARACTERS.value else ""}')


def _print_chunks(data, tokenizer, sizes: list[int], plot: Path | None) -> None:
    surveys = {}
    for ends in _PARAGRAPHS.value:
        fields = {'ends': ends, 'at_most': _DOCUMENTS.value}
        surveys[ends] = found = paragraphs.survey(data, _SPLIT.value, tokenizer, **fields)
        print(f'{_SPLIT.value}, {len(found):,} documents, {ends}: {paragraphs.table(found, sizes)}')
    if plot:
        paragraphs.plot(surveys, sizes, plot, title=f'Chunks that fit the text, {data.source.rpartition("/")[2]}')
        print(f'plot: {plot}')


def _print_overlaps(data) -> None:
    for split in sources.splits(data):
        if split == 'train':
            continue
        found = report.overlap(data, split)
        shown = ', '.join(found.places[:5]) + (f' and {len(found.places) - 5:,} more' if len(found.places) > 5 else '')
        print(
            f'held out: {len(found.places):,} of {found.documents:,} documents of {split} stand in train too'
            + (f': {shown}' if shown else '')
        )


def _batches(config, tokenizer) -> list:
    """Batches as the run would get them; splits other than train as an evaluation would."""
    data, rows = config.data, objectives.load(config.objective).rows
    count = max(1, _ROWS // data.batch_size)
    if _SPLIT.value == 'train':
        iterator = pipeline.train_iterator(data, objective=rows, tokenizer=tokenizer, seed=config.seed)
        return [next(iterator) for _ in range(count)]
    iterator = pipeline.eval_iterator(
        data,
        split=_SPLIT.value,
        context=data.context,
        batch_size=data.batch_size,
        objective=rows,
        tokenizer=tokenizer,
        max_tokens=count * data.batch_size * data.context,
    )
    return list(iterator)


if __name__ == '__main__':
    cli.run(main)
