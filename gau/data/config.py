"""The fields of `config.data`: defaults, what each means, and the one place where they are made whole and checked.

Light on purpose (no Grain, no tokenizer library), so that a script which only reads configs starts at once.
"""

import glob
import os
from typing import TYPE_CHECKING

from ml_collections import ConfigDict, config_dict

from gau.data import globs, manifest
from gau.errors import UserError, check_name, did_you_mean

if TYPE_CHECKING:
    from gau.data.formats import RowFormat

SOURCES = ('embedded', 'text:', 'jsonl:', 'tfds:', 'tokens:', 'mixture', 'pairs:')
TOKENIZERS = ('bytes', 'sentencepiece:', 'huggingface:')
SHUFFLES = ('rows', 'documents', 'none')
PACKINGS = ('concat', 'first_fit', 'document')
TEXT_UNITS = ('file', 'line', 'paragraph')
BAD_LINES = ('error', 'skip')
SPECIAL_IN_TEXT = ('escape', 'error')
MASKINGS = ('token', 'whole_word', 'span')

# The kinds of source that a field is an option of; it must be None beside all others, so that nothing is silently
# ignored. Those of the source are options of data.source alone, the others of valid_source and test_source too.
_OPTIONS_OF = {
    'text_field': ('jsonl', 'tfds'),
    'text_unit': ('text',),
    'bad_lines': ('text', 'jsonl'),
    'special_in_text': ('embedded', 'text', 'jsonl', 'tfds'),
    'cache_dir': ('text', 'jsonl'),
    'valid_source': ('text', 'jsonl', 'tokens'),
    'test_source': ('text', 'jsonl', 'tokens'),
    'holdout_every': ('text', 'jsonl'),
    'tfds_dir': ('tfds',),
}
_OF_THE_SOURCE = ('valid_source', 'test_source', 'holdout_every')
_DEFAULTS = {'text_unit': 'file', 'bad_lines': 'error', 'special_in_text': 'escape', 'holdout_every': 50}


def default_config() -> ConfigDict:
    """Returns every field of the data with its default; None means "decided by the source or the objective".

    Paths of sources and of the tokenizer may be relative; `resolve` makes them absolute.

    source: where documents come from.
      `embedded`: the documentation and source of Python's own standard library, split by file.
      `text:GLOB`, `jsonl:GLOB`: files, plain or .gz/.bz2/.xz/.zst (comma separates several globs, `**` descends).
      `tfds:NAME[/CONFIG]`: a data set already built in the ArrayRecord format.
      `tokens:DIR`: what scripts/prepare_data.py wrote.
      `pairs:P`: rows of P pairs that are drawn, for the objective recall.
      `mixture`: several of these, see the field `mixture`.
    context: N, tokens a row. batch_size: rows a step over all processes.
    streams: into how many the documents are dealt out, each of which gives batch_size / streams rows of every batch.
      The order of the data depends on this number and not on how many processes run. A process reads the streams that
      its rows come from: with 1 each reads everything and keeps its own rows; with as many streams as processes, or a
      multiple, no document is read twice.
    tokenizer: `bytes`, `sentencepiece:MODEL_FILE` or `huggingface:TOKENIZER_JSON`; None: `bytes`, or for `tokens:DIR`
      the one that the shards were prepared with (another one is refused by its fingerprint).
    shuffle: `documents` (one global permutation an epoch, another each epoch), `rows` (the same, and then the packed
      rows within a window, so that the pieces of a long document do not share a batch) or `none`.
    shuffle_window: tokens in that window, for `rows` only (None: 2**20, or one batch if that is more).
    packing: `concat` (documents end to end, split at N: no padding), `first_fit` (whole documents together in a row,
      padded; longer ones in pieces) or `document` (one document, or piece of it, a row). None: `concat` for the
      objective lm, `first_fit` for mlm.
    attend_across_documents: whether attention and positions ignore the borders of documents in a row.
    text_field: of a JSON line or a tfds example, `meta.text` for one within another (None: `text`, for tfds:pg19
      `book_text`).
    text_unit: what is a document in a text file: the `file` (None), a `line`, or a blank-line separated `paragraph`.
    bad_lines: on a document that is not UTF-8, not JSON, or without the field: `error` (None), or `skip` with a count.
    special_in_text: on text that the tokenizer's model takes for a special token, such as `<mask>`: `escape` (None)
      encodes it as the model does without that token, `error` names file, text and token.
    valid_source, test_source: sources of their own for these splits; text_field, text_unit and bad_lines hold for them
      too. Of text and jsonl files it is all documents; of `tokens:DIR` the split of that name, or all if it has none.
      In a mixture they take the place of what its text and jsonl sources hold out, or if it has none of these, of
      what the prepared ones do.
    holdout_every: without a valid_source every so-many-th document (None: 50) of text is held out as `valid`: the
      last one if there are fewer, the tail of a lone one. 0: none, and there is no such split.
    cache_dir: for the decompressed copies of compressed files and the line indices of large ones (None:
      $XDG_CACHE_HOME/gau or ~/.cache/gau).
    tfds_dir: the data_dir of tfds (None: tfds's own default).
    mixture: ((weight, source), ...) for the source `mixture`; weights are shares of the rows, thus of the tokens, and
      a row never mixes sources. An epoch is one pass over all of them together.
    read_threads: threads that read and tokenize (0: in the consumer's). prefetch_batches: batches made ahead (0: none).
    mlm: for the objective mlm.
      rate: share of the tokens to predict. masking: `token`, `whole_word` (all of a word's tokens or none) or `span`
        (runs of geometric length as in SpanBERT); mask_share of the chosen become MASK, random_share a random token,
        the rest stay as they are. span_mean, span_max: of the lengths, for `span` only (None: 5 before the cut, 10).
    classification: for the objectives of classification.
      label_field, second_text_field: of a JSON line, beside text_field; the second text is there or not line by line.
      labels: all of them, in the order of the classes (none: those of the training split, sorted).
    """
    config = ConfigDict()
    config.source = 'embedded'
    config.context = 512
    config.batch_size = 8
    config.streams = 1
    config.tokenizer = config_dict.placeholder(str)
    config.shuffle = 'rows'
    config.shuffle_window = config_dict.placeholder(int)
    config.packing = config_dict.placeholder(str)
    config.attend_across_documents = False
    config.text_field = config_dict.placeholder(str)
    config.text_unit = config_dict.placeholder(str)
    config.bad_lines = config_dict.placeholder(str)
    config.special_in_text = config_dict.placeholder(str)
    config.valid_source = config_dict.placeholder(str)
    config.test_source = config_dict.placeholder(str)
    config.holdout_every = config_dict.placeholder(int)
    config.cache_dir = config_dict.placeholder(str)
    config.tfds_dir = config_dict.placeholder(str)
    config.mixture = ()
    config.read_threads = 1
    config.prefetch_batches = 2
    config.mlm = _default_mlm()
    config.classification = _default_classification()
    return config


def _default_classification() -> ConfigDict:
    return ConfigDict({'label_field': 'label', 'second_text_field': 'text_b', 'labels': ()})


def _default_mlm() -> ConfigDict:
    mlm = ConfigDict()
    mlm.rate = 0.15
    mlm.masking = 'token'
    mlm.mask_share = 0.8
    mlm.random_share = 0.1
    mlm.span_mean = config_dict.placeholder(float)
    mlm.span_max = config_dict.placeholder(int)
    return mlm


def resolve(config: ConfigDict, *, objective: 'str | RowFormat') -> ConfigDict:
    """Returns a copy with every None that another field decides filled in, and with absolute paths.

    Resolving twice changes nothing.

    Raises:
      UserError: an unknown name, a number out of range, a field that does not speak to this source or objective.
    """
    # Imported late: it brings NumPy, which a config that is only written down can do without.
    from gau.data import formats

    config = config.copy_and_resolve_references()
    row_format = formats.get(objective)
    _resolve_paths(config)
    kinds = {source_kind(source) for source in sources(config)}
    separate = {
        source_kind(config[field], f'data.{field}') for field in ('valid_source', 'test_source') if config[field]
    }
    for field, owners in _OPTIONS_OF.items():
        asked = kinds if field in _OF_THE_SOURCE else kinds | separate
        if not asked.isdisjoint(owners):
            if config[field] is None and field in _DEFAULTS and not _replaced(config, field):
                config[field] = _DEFAULTS[field]
        elif config[field] is not None:
            raise UserError(
                f'data.{field}={config[field]} does nothing with data.source="{config.source}": leave it out, it is an '
                f'option of {" and ".join(owners)} sources'
            )
    for field in ('valid_source', 'test_source'):
        if config[field] is not None and source_kind(config[field], f'data.{field}') not in _OPTIONS_OF[field]:
            raise UserError(f'data.{field}="{config[field]}" must be text:GLOB, jsonl:GLOB or tokens:DIR')
    if _replaced(config, 'holdout_every') and config.holdout_every is not None:
        raise UserError('data.holdout_every has no use beside data.valid_source: give one of them')
    _resolve_tokenizer(config)
    config.packing = config.packing or row_format.packing
    _resolve_rows(config)
    for section, defaults in (('mlm', _default_mlm()), ('classification', _default_classification())):
        # A config read back from JSON holds lists.
        own = {field: tuple(x) if isinstance(x, list) else x for field, x in config[section].items()}
        changed = [field for field, value in defaults.items() if own[field] != value]
        if changed and section != row_format.name:
            raise UserError(
                f'data.{section}.{changed[0]} does nothing for the objective {row_format.name}: leave it out'
            )
    if row_format.name == 'mlm':
        _resolve_mlm(config.mlm)
    if row_format.name == 'classification':
        _check_classification(config, kinds | separate)
    return config


def _check_classification(config: ConfigDict, kinds: set[str]) -> None:
    if config.packing != 'document':
        raise UserError(f'data.packing={config.packing}: what is classified has a row of its own (document)')
    for kind in sorted(kinds - {'jsonl', 'embedded'}):
        raise UserError(f'data.source: a {kind} source has no labels; texts to classify are jsonl:GLOB')


def _resolve_paths(config: ConfigDict) -> None:
    """Makes paths absolute, so that they mean the same from any directory. (The tokenizer's: in _resolve_tokenizer.)"""
    sources(config)
    for field in ('source', 'valid_source', 'test_source'):
        if config[field] is not None:
            config[field] = _absolute(config[field])
    if config.mixture:
        config.mixture = tuple((weight, _absolute(source)) for weight, source in mixture(config))


def _absolute(spec: str) -> str:
    """Returns `text:GLOB`, `tokens:DIR`, `sentencepiece:FILE` and the like with absolute paths."""
    kind, colon, rest = spec.partition(':')
    if not colon or kind in ('tfds', 'pairs'):
        return spec
    if kind not in ('text', 'jsonl'):
        return f'{kind}:{_join(os.getcwd(), rest)}'
    # A comma cannot be escaped in a list of globs; below a directory with one in its name they stay relative.
    if ',' in os.getcwd():
        return spec
    return f'{kind}:{",".join(_join(glob.escape(os.getcwd()), pattern) for pattern in globs.split(rest))}'


def _join(directory: str, path: str) -> str:
    path = os.path.expanduser(path)
    # What stands before `..` may be a link or a glob, so nothing is cut but the leading dot; nothing stays nothing.
    return os.path.join(directory, path.removeprefix('./')) if path else path


def _replaced(config: ConfigDict, field: str) -> bool:
    return field == 'holdout_every' and config.valid_source is not None


def _resolve_tokenizer(config: ConfigDict) -> None:
    # On a command line None is spelt out.
    if config.tokenizer in ('', 'None'):
        config.tokenizer = None
    prepared = [source for source in sources(config) if source_kind(source) == 'tokens']
    if config.tokenizer is None and prepared:
        config.tokenizer = manifest.tokenizer_spec(prepared[0].partition(':')[2])
    config.tokenizer = config.tokenizer or 'bytes'
    _check_prefix('data.tokenizer', config.tokenizer, TOKENIZERS)
    config.tokenizer = _absolute(config.tokenizer)


def _resolve_rows(config: ConfigDict) -> None:
    for field, options in (
        ('shuffle', SHUFFLES),
        ('packing', PACKINGS),
        ('text_unit', TEXT_UNITS),
        ('bad_lines', BAD_LINES),
        ('special_in_text', SPECIAL_IN_TEXT),
    ):
        if config[field] is not None:
            check_name(f'data.{field}', config[field], options)
    for field, least in (
        ('context', 1),
        ('batch_size', 1),
        ('streams', 1),
        ('read_threads', 0),
        ('prefetch_batches', 0),
    ):
        if config[field] < least:
            raise UserError(f'data.{field}={config[field]} must be at least {least}')
    if config.batch_size % config.streams:
        raise UserError(f'data.batch_size={config.batch_size} must be a multiple of data.streams={config.streams}')
    if config.holdout_every is not None and config.holdout_every < 2 and config.holdout_every != 0:
        raise UserError(f'data.holdout_every={config.holdout_every} must be at least 2, or 0 to hold nothing out')
    if config.packing == 'document' and config.attend_across_documents:
        raise UserError('data.attend_across_documents=True has no meaning with data.packing="document": one a row')
    if config.shuffle == 'rows':
        if config.shuffle_window is None:
            config.shuffle_window = max(2**20, config.batch_size * config.context)
        if config.shuffle_window < config.context:
            raise UserError(f'data.shuffle_window={config.shuffle_window} tokens are less than one row')
    elif config.shuffle_window is not None:
        raise UserError(f'data.shuffle_window is for data.shuffle="rows", which is "{config.shuffle}"')


def _resolve_mlm(mlm: ConfigDict) -> None:
    check_name('data.mlm.masking', mlm.masking, MASKINGS)
    if not 0 < mlm.rate <= 1:
        raise UserError(f'data.mlm.rate={mlm.rate} must lie in 0..1, above 0')
    if not (min(mlm.mask_share, mlm.random_share) >= 0 and mlm.mask_share + mlm.random_share <= 1):
        raise UserError(
            f'data.mlm.mask_share={mlm.mask_share} and data.mlm.random_share={mlm.random_share} must be shares of one'
        )
    if mlm.masking == 'span':
        mlm.span_mean = 5.0 if mlm.span_mean is None else mlm.span_mean
        mlm.span_max = 10 if mlm.span_max is None else mlm.span_max
        if not 1 <= mlm.span_mean < float('inf') or mlm.span_max < 1:
            raise UserError('data.mlm.span_mean and data.mlm.span_max must be at least 1, the mean finite')
    elif mlm.span_mean is not None or mlm.span_max is not None:
        raise UserError(f'data.mlm.span_* is for data.mlm.masking="span", which is "{mlm.masking}"')


def sources(config: ConfigDict) -> list[str]:
    """Returns the sources of `config`: one, or those of the mixture in its order.

    Raises:
      UserError: an unknown kind of source, or a mixture that is malformed, missing, or given without being asked for.
    """
    if config.source != 'mixture':
        if config.mixture:
            raise UserError(f'data.mixture is for data.source="mixture", which is "{config.source}"')
        source_kind(config.source)
        return [config.source]
    return [source for _, source in mixture(config)]


def mixture(config: ConfigDict) -> list[tuple[float, str]]:
    """Returns the (weight, source) pairs of a mixture. Raises UserError as `sources` does."""
    # A config read back from JSON holds lists.
    pairs = [tuple(pair) if isinstance(pair, list | tuple) else (pair,) for pair in config.mixture]
    if not pairs:
        raise UserError('data.source="mixture" needs data.mixture=((weight, source), ...)')
    for pair in pairs:
        well_formed = len(pair) == 2 and isinstance(pair[0], int | float) and isinstance(pair[1], str)
        if not well_formed or not 0 < pair[0] < float('inf'):
            raise UserError(f'data.mixture: {pair!r} must be a pair (weight above 0, source)')
        if source_kind(pair[1], 'data.mixture') == 'mixture':
            raise UserError('data.mixture: a mixture cannot hold a mixture')
    return pairs


def source_kind(source: str, field: str = 'data.source') -> str:
    """Returns `text` for `text:GLOB` and so on; raises UserError for an unknown kind or one without its argument."""
    return _check_prefix(field, source, SOURCES)


def _check_prefix(field: str, value: str, options: tuple[str, ...]) -> str:
    kind, colon, rest = value.partition(':')
    if kind + colon not in options:
        if f'{kind}:' in options:
            raise UserError(f'{field}="{value}" must be "{kind}:..."')
        raise UserError(f'{field}="{value}" is unknown{did_you_mean(kind, [option.rstrip(":") for option in options])}')
    if colon and not rest:
        raise UserError(f'{field}="{value}" lacks what stands behind the colon')
    return kind
