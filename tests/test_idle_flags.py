"""Flags that would do nothing beside others, or without them, are refused in one line by the program that has them."""

import pytest

from tests.programs import call

LM, MLM = '--config=configs/lm.py:runlocal', '--config=configs/mlm.py:runlocal'
TRAIN = f'train.py {LM} --workdir=TMP/run'
SWEEP = f'scripts/sweep.py {LM} --sweep=seed:1'
SAMPLE = 'scripts/sample.py --workdir=TMP/run'
# What a command line says, and what it is answered.
REFUSED = {
    f'{TRAIN} {MLM}': '--config is given twice',
    f'{TRAIN} --workdir=TMP/other': '--workdir is given twice',
    f'{TRAIN} --config.optimizer.learning_rate=nan': '--config.optimizer.learning_rate=nan is not a number',
    'scripts/compare_runs.py --output=a.png': 'error: --workdirs must be given',
    'scripts/export.py': 'error: --workdir, --output must be given',
    f'{TRAIN} --distributed=off --heartbeat_seconds=9': '--heartbeat_seconds does nothing with --distributed=off',
    'train.py --config=configs/lm.py:model=flash,runlocal,model=mamba --workdir=TMP/run': (
        'config argument model is given twice'
    ),
    f'{SWEEP} --chip=v4 --workdir=TMP': '--chip does nothing without --dry_run',
    f'{SWEEP} --utilisation=0.3': '--utilisation does nothing without --dry_run',
    f'{SWEEP} --vocab_size=9': '--vocab_size does nothing without --dry_run or --compile_check',
    f'{SWEEP} --dry_run --compile_check=cpu:1': '--compile_check does nothing with --dry_run',
    f'{SWEEP} --dry_run --utilisation=0': 'in the range [0.001, 1]',
    f'{SWEEP} --dry_run --kept=': '--kept= names nothing',
    f'scripts/sweep.py {LM} --sweep=seed:0 --dry_run': 'want one seed at least',
    'scripts/sweep.py --config=configs/quality.py:context=8192 --sweep=exact --dry_run': 'context is given twice',
    'scripts/reproduce.py branches --chip=v4': '--chip does nothing without --dry_run or --missing',
    'scripts/reproduce.py --missing --kept=': '--kept= names nothing',
    'scripts/reproduce.py branches --source=text:a': '--source does nothing with --budget=tiny: its data are embedded',
    'scripts/reproduce.py branches --budget=small --tokenizer=bytes': '--tokenizer does nothing without --source',
    f'{SAMPLE} --batch_size=2': '--batch_size does nothing without --prompts',
    f'{SAMPLE} --temperature=0 --seed=3': '--seed does nothing with --temperature=0',
    f'{SAMPLE} --max_tokens=0 --save_state=TMP/s --num=2': '--num does nothing with --max_tokens=0',
    f'{SAMPLE} --stop=': '--stop= names no text',
    f'scripts/describe.py {LM} --fields --contexts=9': '--contexts does nothing with --fields',
    f'scripts/describe.py {LM} --models=flash --config.model.num_layers=3': 'num_layers does nothing with --models',
    f'scripts/inspect_data.py {LM} --chunks=32 --examples=1': '--examples does nothing with --chunks',
    f'scripts/inspect_data.py {LM} --examples=0 --characters=9': '--characters does nothing with --examples=0',
    'scripts/prepare_data.py --source=embedded --tokenizer=bytes --tokenizer_sample_mb=3 --output=TMP/t': (
        '--tokenizer_sample_mb does nothing without --train_tokenizer'
    ),
    'scripts/prepare_data.py --source=embedded --tokenizer=bytes --splits= --output=TMP/t': '--splits= names none',
    'scripts/prepare_data.py --source=embedded --train_tokenizer=300 --tokenizer_sample_mb=inf --output=TMP/t': 'range',
    'scripts/attention_ranks.py a.jsonl --split=test': '--split does nothing without a work directory',
    f'scripts/attention_sizes.py {LM} --config.init_from=runs/a': 'does nothing here: layers are looked into',
    f'scripts/compile_check.py {LM} --shardings --sweep=batch': '--sweep does nothing with --shardings',
    f'scripts/compile_check.py {LM} --shardings --json=TMP/x': '--json does nothing with --shardings',
    f'scripts/benchmark_meshes.py {LM} --meshes=1x1x1x1 --config.mesh.data=1': '--config.mesh.data does nothing',
    'scripts/benchmark.py --quick --models=flash:xla --impls=reference': '--impls is for models that name none',
    'scripts/torture.py --minutes=0': '--minutes=0 begins none',
    'scripts/torture.py --minutes=nan': '--minutes=nan is not a number',
}


@pytest.mark.parametrize('line', REFUSED)
def test_what_would_do_nothing_is_refused_in_one_line(line, tmp_path):
    script, *arguments = line.replace('TMP', str(tmp_path)).split()
    code, out, err = call(script, *arguments)
    assert (code, out, err.count('\n')) == (2, '', 1), err
    assert REFUSED[line] in err
    assert not list(tmp_path.iterdir())


def test_one_point_is_all_that_a_dry_run_of_it_counts():
    code, out, err = call('scripts/sweep.py', LM, '--sweep=seed:3', '--dry_run', '--point=1')
    assert code == 0, err
    table = out.partition('\n\n')[2].splitlines()
    assert [line.split()[0] for line in table] == ['point', '1', 'point']
