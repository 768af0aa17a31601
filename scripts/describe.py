"""Prints a model as a table: parameters, FLOPs and activation memory, part by part and context by context, and the size
of its decoding state.

    python scripts/describe.py --config=configs/lm.py:model=flash,size=base --contexts=512,8192
    python scripts/describe.py --config=configs/lm.py:size=base --models=flash,flash_quad,transformer_plus_plus

The first form takes the config's model apart; the second sets models of the config's size side by side, each with its
own defaults. `--fields` prints what can be set of the config's model. FLOPs and memory are per token: FLOPs of the
forward pass (a training step is three times that), memory that is saved for the backward pass. `gau.models.counts` says
exactly what is counted. No model is built, and JAX is not needed.
"""

import textwrap
from collections.abc import Collection, Sequence

import _root  # noqa: F401
from absl import flags
from ml_collections import ConfigDict

from gau import cli
from gau.errors import UserError
from gau.models import counts
from gau.models.architectures import ARCHITECTURES
from gau.models.config import default_config, resolve
from gau.models.fields import check_choice
from gau.objectives import objective as objectives

_CONTEXTS = flags.DEFINE_list('contexts', None, 'Context lengths; default: data.context of the config.')
_MODELS = flags.DEFINE_list('models', None, 'Models to set side by side, by name.')
_FIELDS = flags.DEFINE_boolean('fields', False, "The fields of the config's model, and what they mean.")
_VOCAB_SIZE = flags.DEFINE_integer('vocab_size', 32_000, 'Vocabulary.', lower_bound=1)


_MAX_WIDTH = 100


def main() -> None:
    """Prints the table that the flags ask for."""
    # Not `cli.load_config`: that asks for the data, and a model can be described without any.
    config = flags.FLAGS.config
    contexts = cli.parse_positive_integers('contexts', _CONTEXTS.value) or [config.data.context]
    options = {'objective': config.objective, 'vocab_size': _VOCAB_SIZE.value, 'contexts': contexts}
    if _FIELDS.value and _MODELS.present:
        raise UserError("--fields is of the config's model: with --models it does nothing")
    own = [path for path in cli.overrides() if path.startswith('model.') and path != 'model.size']
    if own and _MODELS.present:
        raise UserError(f'--config.{own[0]} does nothing with --models: each of them has its own defaults')
    if _FIELDS.value:
        cli.refuse('contexts', 'vocab_size', beside='fields', because='it counts nothing')
        print(explain(config.model.name))
    elif not _MODELS.present:
        print(describe(config.model, **options, given=[*cli.overrides(), 'data.context']))
    elif not _MODELS.value:
        raise UserError('--models names none')
    else:
        print(compare([_named(name, config.model.size) for name in _MODELS.value], **options))


def explain(name: str) -> str:
    """Returns the fields of a model: values, default and meaning."""
    check_choice('model.name', name, ARCHITECTURES)
    lines = []
    for field, declared in sorted(ARCHITECTURES[name].fields.items()):
        values = ' | '.join(declared.choices) or declared.kind.__name__
        default = '' if declared.default is None else f', default {declared.default}'
        text = textwrap.fill(declared.doc, _MAX_WIDTH, initial_indent='    ', subsequent_indent='    ')
        lines.append(f'model.{field}: {values}{default}\n{text}')
    return '\n'.join(lines)


def describe(
    model: ConfigDict, *, objective: str, vocab_size: int, contexts: list[int], given: Collection[str] = ()
) -> str:
    """Returns the parts of one model, at each of the contexts.

    Args:
      model: a model's config, resolved or not.
      objective: such as 'lm' or 'mlm'.
      vocab_size: V.
      contexts: tokens in a sequence. What depends on it, such as a bias table, follows each of them.
      given: paths of the fields that the command line sets.
    """
    causal = objectives.load(objective).causal
    # One column a context, of (part, parameters, MFLOP, kB).
    columns, states = [], []
    for context in contexts:
        resolved = resolve(model, causal=causal, context=context, given=given)
        options = {'context': context, 'vocab_size': vocab_size, 'causal': causal}
        column = [
            (name, part.parameters, f'{part.flops / 1e6:,.3f}', f'{part.activation_bytes / 1e3:,.1f}')
            for name, part in counts.table(resolved, **options)
        ]
        flops, kept = (
            counts.flops_per_token(resolved, **options),
            counts.activation_bytes_per_token(resolved, **options),
        )
        total = counts.parameters(resolved, vocab_size=vocab_size)
        columns.append([*column, ('total', total, f'{flops / 1e6:,.3f}', f'{kept / 1e3:,.1f}')])
        states.append(f'{_state(resolved, context, causal)} @{context}')
    title = f'{model.name}, {objective}, vocabulary {vocab_size:,}, remat {resolved.remat}; per token'
    title += f'\nMiB of the decoding state of a sequence: {", ".join(states)}'
    header, *rows, total = _beside('part', ('MFLOP', 'kB'), contexts, columns)
    return f'{title}\n\n{_format([header, *_merge_alike(rows), total])}'


def compare(models: list[ConfigDict], *, objective: str, vocab_size: int, contexts: list[int]) -> str:
    """Returns one line a model: parameters, and FLOPs, activation memory and state at each of the contexts."""
    causal = objectives.load(objective).causal
    columns = []
    for context in contexts:
        options = {'context': context, 'vocab_size': vocab_size, 'causal': causal}
        columns.append([])
        for model in models:
            resolved = resolve(model, causal=causal, context=context)
            flops = counts.flops_per_token(resolved, **options)
            kept = counts.activation_bytes_per_token(resolved, **options)
            figures = f'{flops / 1e6:,.1f}', f'{kept / 1e3:,.1f}', _state(resolved, context, causal)
            columns[-1].append((model.name, counts.parameters(resolved, vocab_size=vocab_size), *figures))
    return _format(_beside('model', ('MFLOP', 'kB', 'state MiB'), contexts, columns))


def _beside(
    what: str, figures: Sequence[str], contexts: list[int], columns: Sequence[Sequence[tuple]]
) -> list[list[str]]:
    """Returns a table, with its head: a line for each name, the figures of all contexts side by side.

    Parameters stand once, unless they are others at another context.

    Args:
      what: the head of the names.
      figures: the heads of what follows parameters.
      contexts: tokens in a sequence.
      columns: of each context: name, parameters, figures of each line.
    """
    lines = list(zip(*columns, strict=True))
    alike = all(len({parameters for _, parameters, *_ in line}) == 1 for line in lines)
    heads = figures if alike else ('parameters', *figures)
    table = [[what, *(['parameters'] if alike else []), *(f'{head} @{n}' for n in contexts for head in heads)]]
    for line in lines:
        row = [line[0][0], *([f'{line[0][1]:,}'] if alike else [])]
        for _, parameters, *found in line:
            row += [*([] if alike else [f'{parameters:,}']), *found]
        table.append(row)
    return table


def _state(model: ConfigDict, context: int, causal: bool) -> str:
    """Returns the MiB of a decoding state of so many tokens; "-": there is none."""
    size = counts.state_bytes(model, context=context) if causal else None
    return '-' if size is None else f'{size / 2**20:,.2f}'


def _merge_alike(rows: list[list[str]]) -> list[list[str]]:
    """Joins neighbouring layers that cost the same into one line."""
    merged, first = [], 0
    for i, row in enumerate(rows):
        if i + 1 < len(rows) and rows[i + 1][1:] == row[1:]:
            continue
        name = row[0] if i == first else f'{rows[first][0]} to {row[0].split()[-1]}, each'
        merged.append([name, *row[1:]])
        first = i + 1
    return merged


def _format(rows: list[list[str]]) -> str:
    """Aligns the columns; those that do not fit beside each other follow below, behind those of no context again."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    blocks, used = [], _MAX_WIDTH
    fixed = [column for column, head in enumerate(rows[0]) if '@' not in head]
    for column in range(len(fixed), len(widths)):
        if used + 2 + widths[column] > _MAX_WIDTH:
            blocks.append([*fixed])
            used = sum(widths[i] for i in fixed) + 2 * (len(fixed) - 1)
        blocks[-1].append(column)
        used += 2 + widths[column]
    return '\n\n'.join(_aligned([[row[i] for i in block] for row in rows]) for block in blocks)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        numbers = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append('  '.join([row[0].ljust(widths[0]), *numbers]))
    return '\n'.join([lines[0], '-' * len(lines[0]), *lines[1:]])


def _named(name: str, size: str) -> ConfigDict:
    config = default_config()
    config.name, config.size = name, size
    return config


if __name__ == '__main__':
    cli.define_config()
    cli.run(main)
