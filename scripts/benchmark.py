"""Measures speed and memory on this machine: JSON lines, tables, pictures.

    python scripts/benchmark.py                         everything at base size: for a GPU, and for hours
    python scripts/benchmark.py --quick                 everything with tiny models, a minute or two on a CPU
    python scripts/benchmark.py --what=train --contexts=512,8192 --models=flash,transformer_plus_plus::full,flash_quad
    python scripts/benchmark.py --what=train --models=flash,torch_flash_lucidrains    needs requirements-benchmark.txt

`train` is the full training step of train.py on random tokens, `forward` the losses of all tokens without a gradient.
`--objective=halves` also has `cross_flash` and `cross_transformer_plus_plus`, which read a source in half of a row.
`decode` times tokens one by one, each looking back on `context` tokens; `prefill` a prompt of that length. GB/s of
`decode` are the bytes that a step has to read (parameters, and what tokens look back on) over its time; beside them is
their share of the rate at which an array is copied.

A model may carry the settings that it is measured at, `model:impl:remat:layer_stack:accumulation_steps:segment_tokens`.
Empty parts mean the default, and parts at the end may be left out: `flash:reference,flash::full:scan` are two to
compare. Behind them may stand any other fields of `config.model`, `flash:key_input=shifted:decay_gate=scalar`, for all
kinds. At the end may stand contexts, `flash_quad@512+8192`, which then count in place of `--contexts`; a model named
twice has those of both.

Training and forward have a process for each measurement, so that memory is its own; decode and prefill share one. What
does not fit or crashes is a row that says so. `--rounds` measures all of them in turn several times; the median counts.
"""

import datetime
import importlib.util
import signal
import sys
import tempfile
from pathlib import Path

import _root  # noqa: F401
from absl import flags

from gau import cli, source, strict_json
from gau.benchmarks import cells, processes, report
from gau.errors import UserError

_WHAT = flags.DEFINE_list('what', list(cells.KINDS), f'Kinds of measurement: {", ".join(cells.KINDS)}.')
_MODELS = flags.DEFINE_list('models', None, 'Models, with settings or without; flash, transformer_plus_plus, ...')
_IMPLS = flags.DEFINE_list('impls', ['auto'], 'config.model.impl of the models that name none; each of them is a row.')
_REMAT = flags.DEFINE_string('remat', 'none', 'config.model.remat of the models that name none.')
_LAYER_STACK = flags.DEFINE_string('layer_stack', 'unrolled', 'config.model.layer_stack of those that name none.')
_SIZE = flags.DEFINE_string('size', None, 'Of the models: tiny, small, base or large; base, or tiny with --quick.')
_CONTEXTS = flags.DEFINE_list(
    'contexts', None, 'Tokens of context of models that name none; each kind has its own default.'
)
_TOKENS = flags.DEFINE_integer('tokens_per_step', 65_536, 'Of train and forward: batch times context.', lower_bound=1)
_PROFILE = flags.DEFINE_boolean('profile', False, 'Also the kernels of a GPU by name, in the rows.')
_BATCHES = flags.DEFINE_list('batch_sizes', None, 'Of decode: sequences side by side; 1, 8 and 64, or 4 with --quick.')
_OBJECTIVE = flags.DEFINE_string('objective', 'lm', 'lm, mlm or halves, for train and forward.')
_PACKED = flags.DEFINE_boolean('packed', False, 'Train and forward: documents packed that do not see each other.')
_OPTIMIZER = flags.DEFINE_string('optimizer', 'adamw', 'config.optimizer.name, for train.')
_ROUNDS = flags.DEFINE_integer('rounds', None, 'How often all is measured; 2, or 1 with --quick.', lower_bound=1)
_QUICK = flags.DEFINE_boolean('quick', False, 'Tiny models, short sequences, float32, few samples: for a CPU.')
flags.DEFINE_string('output', 'runs/benchmark/rows.jsonl', 'File of JSON lines; pictures lie beside it.')

_FULL_CONTEXTS = {
    'train': (512, 8192, 65_536),
    'forward': (512, 8192, 65_536),
    'decode': (1024, 4096, 16_384, 65_536, 131_072),
    'prefill': (1024, 4096, 16_384, 65_536, 131_072),
}
_QUICK_CONTEXTS = dict.fromkeys(cells.KINDS, (512,))
# Flags that would do nothing if none of these kinds is measured.
_SPEAKS_TO = dict.fromkeys(
    ('impls', 'remat', 'layer_stack', 'tokens_per_step', 'objective', 'packed'), cells.PASSES
) | {'batch_sizes': ('decode',), 'optimizer': ('train',)}


def main() -> int:
    """Measures, keeping the file up to date after every process; returns 1 if nothing could be measured."""
    plan, output = _plan(), cli.output_file('output')
    if output is None:
        raise UserError('--output must name a file')
    # As an exception it ends the process that is measuring, too.
    signal.signal(signal.SIGTERM, lambda signum, _: sys.exit(128 + signum))
    about = _about()
    rounds = _ROUNDS.value or (1 if _QUICK.value else 2)
    results: dict[cells.Cell, list[processes.Result]] = {cell: [] for cell in plan}
    with (
        tempfile.TemporaryDirectory() as cache,
        processes.Workers(processes.environment(Path(cache)), log=output.with_suffix('.log')) as workers,
    ):
        for round_number in range(1, rounds + 1):
            for cell in plan:
                if any('error' in result for result in results[cell]):
                    continue
                results[cell].append(workers.measure(cell))
                rows = [processes.merge(cell, own) | about for cell, own in results.items() if own]
                processes.add_utilisation(rows)
                _write(output, rows)
                row = rows[list(results).index(cell)]
                print(f'round {round_number} of {rounds}: {report.brief(row)}', flush=True)
    pictures = report.plot(rows, output.with_suffix(''))
    print(f'\n{_title(rows)}\n\n{report.table(rows)}\n')
    print('written:', ', '.join(str(path) for path in (output, *pictures)))
    return 0 if any('error' not in row for row in rows if row['benchmark'] not in cells.RATES) else 1


def _plan() -> list[cells.Cell]:
    if not _WHAT.value:
        raise UserError(f'--what= names no kind of measurement: {", ".join(cells.KINDS)}')
    for name, kinds in _SPEAKS_TO.items():
        if flags.FLAGS[name].present and set(kinds).isdisjoint(_WHAT.value):
            raise UserError(
                f'--{name} speaks to {" and ".join(kinds)}, --what={",".join(_WHAT.value)} measures neither'
            )
    quick = _QUICK.value
    cells.check_objective(_OBJECTIVE.value)
    models = _MODELS.value or ['flash', 'transformer_plus_plus', *([] if quick else ['flash_quad'])]
    specs, own_contexts = _specs(models)
    if _CONTEXTS.present and not specs:
        raise UserError('--contexts is for models without contexts of their own, and --models names none')
    for name, part in (('impls', 'impl'), ('remat', 'remat'), ('layer_stack', 'layer_stack')):
        if flags.FLAGS[name].present and all(cells.names(model.partition('@')[0], part) for model in models):
            raise UserError(f'--{name} is for models that name none, and all of --models do')
    contexts = cli.parse_positive_integers('contexts', _CONTEXTS.value)
    plan = cells.plan(
        specs,
        kinds=_WHAT.value,
        contexts=dict.fromkeys(cells.KINDS, contexts) if contexts else _QUICK_CONTEXTS if quick else _FULL_CONTEXTS,
        tokens_per_step=512 if quick and not flags.FLAGS['tokens_per_step'].present else _TOKENS.value,
        batch_sizes=cli.parse_positive_integers('batch_sizes', _BATCHES.value) or ([4] if quick else [1, 8, 64]),
        matmul_edge=1024 if quick else 8192,
        memory_mib=16 if quick else 4096,
        own_contexts=own_contexts,
        size=_SIZE.value or ('tiny' if quick else 'base'),
        objective=_OBJECTIVE.value,
        packed=_PACKED.value,
        optimizer=_OPTIMIZER.value,
        dtype='float32' if quick else 'bfloat16',
        vocab_size=1000 if quick else 32_000,
        effort='quick' if quick else 'full',
        profile=_PROFILE.value,
    )
    wanted = {'torch'} if any(cell.by_torch for cell in plan) else set()
    wanted |= {'flash_pytorch'} if any(cell.spec.model == 'torch_flash_lucidrains' for cell in plan) else set()
    for module in sorted(wanted, reverse=True):
        if importlib.util.find_spec(module) is None:
            raise UserError(
                f'--models={",".join(models)}: {module} is missing: pip install -r requirements-benchmark.txt'
            )
    return plan


def _specs(models: list[str]) -> tuple[list[cells.Spec], dict[cells.Spec, list[int]]]:
    """Returns the specs without contexts of their own, and those with them."""
    defaults = {'impls': _IMPLS.value, 'remat': _REMAT.value, 'layer_stack': _LAYER_STACK.value}
    specs, own_contexts = [], {}
    for text in models:
        model, at, contexts = text.partition('@')
        parsed = cells.parse_spec(model, **defaults)
        if not at:
            specs += parsed
            continue
        for context in contexts.split('+'):
            if not context.isdecimal() or int(context) == 0:
                raise UserError(f'--models={text}: "{context}" is no context, want {model}@512+8192')
            for spec in parsed:
                own_contexts.setdefault(spec, []).append(int(context))
    return specs, own_contexts


def _write(path: Path, rows: list[processes.Row]) -> None:
    aside = path.with_name(f'.{path.name}')
    aside.write_text(''.join(strict_json.dumps(row) + '\n' for row in rows))
    aside.replace(path)


def _title(rows: list[processes.Row]) -> str:
    names = {name: sorted({row[name] for row in rows if name in row}) for name in ('device', 'jax', 'torch')}
    versions = ''.join(f', {name} {" ".join(names[name])}' for name in ('jax', 'torch') if names[name])
    row = rows[0]
    what = f'{row["size"]}, {row["objective"]}{", packed" * row["packed"]}, {row["dtype"]}'
    if row['optimizer'] != 'adamw':
        what += f', {row["optimizer"]}'
    return f'{" ".join(names["device"]) or "no device"}{versions}, commit {row["commit"]}: {what}'


def _about() -> dict[str, str]:
    return {'commit': source.commit() or 'unknown', 'date': datetime.date.today().isoformat()}


if __name__ == '__main__':
    cli.run(main)
