"""What the config programs share: their argument, the data presets, and the shrinking to a laptop."""

import difflib
import json
from collections.abc import Collection, Sequence
from pathlib import Path

from ml_collections import ConfigDict

from gau.errors import UserError, did_you_mean
from gau.models import config as model_config
from gau.models.architectures import ARCHITECTURES, BEST_FLASH
from gau.training import config as training_config

# The paper's batch (as recalled): the same number of tokens at every context length.
TOKENS_PER_STEP = 2**18

# `best` is what reached the lowest loss here. `paper` is what the paper says: AdamW; a sinusoid is added to the
# embeddings even where queries and keys are rotated; in the gated models the relative bias starts as N(0, 0.02), and
# scores are divided by the length of the sequence (of the chunk).
RECIPES = ('best', 'paper')
# Of the language models of recipe=best, Transformer++ included: docs/results/quality_muon.md.
BEST_OPTIMIZER = {'name': 'muon', 'learning_rate': 4e-3}

# The config of the run that an export comes from, beside the export's own.
TRAINING_CONFIG = 'training_config.json'

# Data sets of the paper, as scripts/prepare_data.py leaves them (docs/data.md).
PREPARED = ('wiki40b', 'pg19', 'c4', 'lm1b')


def parse_arg(arg: str | None, **defaults: str | int | float | bool) -> ConfigDict:
    """Parses the part of `--config=FILE:name=value,name=value` after the colon.

    Args:
      arg: that part; a name alone means `name=True`, and a list of files may hold commas. `runlocal` is understood by
        every config.
      **defaults: the names that the config knows, with their defaults; a value takes the default's type.

    Raises:
      UserError: an unknown name, one that is given twice, or a value of the wrong type.

    Returns:
      The values by name, and in `given` the names that were given.
    """
    values, given = {'runlocal': False, **defaults}, []
    for item in _items(arg or '', values):
        name, equals, text = item.partition('=')
        if not name:
            continue
        if name not in values:
            raise UserError(f'unknown config argument "{name}"{did_you_mean(name, values)}')
        if name in given:
            raise UserError(f'config argument {name} is given twice')
        values[name] = _convert(name, text if equals else 'True', type(values[name]))
        given.append(name)
    return ConfigDict({**values, 'given': tuple(given)})


def _items(arg: str, known: Collection[str]) -> list[str]:
    """Splits at commas, but not within a list of files, as in `data=text:a.txt,b.txt,runlocal`."""
    items: list[str] = []
    for part in arg.split(','):
        name = part.partition('=')[0]
        listed = items and ':' in items[-1].partition('=')[2]
        if listed and name not in known and not difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            items[-1] += f',{part}'
        else:
            items.append(part)
    return items


def _convert(name: str, text: str, kind: type) -> str | int | float | bool:
    if kind is bool:
        if text.lower() in ('true', '1', 'false', '0'):
            return text.lower() in ('true', '1')
        raise UserError(f'config argument {name}={text}: want true or false')
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f'config argument {name}={text}: want {kind.__name__}') from error


def pretraining_config(arg: ConfigDict, *, objective: str = 'lm') -> ConfigDict:
    """Returns the defaults with `model`, `size`, `context`, `recipe`, `data` and `tokenizer` put in their places.

    `data` is a name of PREPARED, read from data/NAME, or a source such as `jsonl:PATH`; `tokenizer` may be empty, which
    means the one that the shards were prepared with, or bytes. `recipe` is one of RECIPES, `best` if it is not there.

    Raises:
      UserError: an unknown recipe.
    """
    config = training_config.default_config()
    config.objective = objective
    config.model.name = arg.model
    config.model.size = arg.size
    config.data.source = f'tokens:data/{arg.data}' if arg.data in PREPARED else arg.data
    config.data.context = arg.context
    config.data.batch_size = max(TOKENS_PER_STEP // arg.context, 1)
    _apply_recipe(config, arg.get('recipe', 'best'))
    if arg.tokenizer:
        config.data.tokenizer = arg.tokenizer
    return config


def _apply_recipe(config: ConfigDict, recipe: str) -> None:
    if recipe not in RECIPES:
        raise UserError(f'config argument recipe={recipe} is unknown{did_you_mean(recipe, RECIPES)}')
    if recipe == 'paper' and config.model.name in ('flash', 'flash_quad'):
        config.model.relative_bias_init = 'normal'
        config.model.normalizer = 'paper'
    if recipe == 'paper' or config.objective != 'lm':
        # What follows has not been tried in masked language models.
        return
    config.optimizer.update(BEST_OPTIMIZER)
    architecture = ARCHITECTURES.get(config.model.name)
    if architecture is not None and architecture.fields['rope'].default != 'none':
        config.model.absolute_position = 'none'  # docs/results/quality_causes.md
    if config.model.name == 'flash':
        several = config.data.context > 2 * BEST_FLASH['chunk_size']
        config.model.update(BEST_FLASH if several else {'key_input': BEST_FLASH['key_input']})


def start_from(config: ConfigDict, source: str) -> bool:
    """Lets a config start from a trained model, in place: `init_from`, the fields of its model, and its tokenizer.

    Args:
      config: to change. Dropout, and what computes the model, stay as they are.
      source: a work directory, a checkpoint in one, or an export.

    Returns:
      Whether that model is causal.

    Raises:
      UserError: it is none of these.
    """
    # Imported late: these import NumPy, and a program says what is wrong with a command before that.
    from gau.objectives import objective as objectives
    from gau.training import workdir as files

    path = Path(source).absolute()
    workdir, _ = files.checkpoint_of(path)
    exported = path / TRAINING_CONFIG
    try:
        trained = json.loads((exported if exported.is_file() else workdir / files.CONFIG).read_text(encoding='utf-8'))
        model, tokenizer = trained['model'], trained['data']['tokenizer']
        causal = objectives.load(trained['objective']).causal
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f'config argument {source}: neither a work directory, nor a checkpoint in one, nor an export'
        ) from error
    config.init_from = str(path)
    own = {field: config.model[field] for field in ('dropout_rate', 'impl', 'layer_stack', 'remat')}
    dtype = {'dtype': config.model.dtype}
    config.model = model_config.default_config()
    config.model.update(dtype | {field: value for field, value in model.items() if value is not None} | own)
    config.data.tokenizer = tokenizer
    return causal


def run_local(config: ConfigDict, given: Sequence[str] = ()) -> ConfigDict:
    """Shrinks any config to seconds on a laptop, in place: the same code, a toy of a run on the embedded corpus.

    Args:
      config: to shrink.
      given: arguments that the user gave and that stand as they are: `size`, `context`, `data`, `tokenizer`.
    """
    if 'size' not in given:
        config.model.size = 'tiny'
    if 'context' not in given:
        config.data.context = 128
    if 'data' not in given:
        config.data.source = 'embedded'
    if 'tokenizer' not in given:
        # Bytes, or that of the prepared tokens put in the corpus's place.
        config.data.tokenizer = None
    if config.model.name in ARCHITECTURES:
        config.model.update(ARCHITECTURES[config.model.name].attention.laptop)
    config.model.dtype = 'float32'
    config.data.batch_size = 4
    config.mesh.data = 1  # four rows do not divide over every machine's devices
    config.steps, config.tokens, config.epochs = 20, None, None
    _every(config.optimizer, 'warmup_', 5)
    _every(config.checkpoint, 'every_', 10)
    _every(config.eval, 'every_', 10)
    config.eval.max_tokens = 4096
    config.log.every_steps = 1
    return config


def _every(section: ConfigDict, stem: str, steps: int) -> None:
    for unit in ('tokens', 'epochs', 'percent'):
        section[stem + unit] = None
    section[f'{stem}steps'] = steps
