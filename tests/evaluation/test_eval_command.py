"""eval.py as a user calls it: the run's own evaluators, others, and text that the run was not trained beside."""

import json
import shutil
import types

import pytest

from gau.errors import UserError
from gau.training import evaluate, workdir
from gau.training.load import load_run
from tests.programs import call, report
from tests.training.tiny import read_metrics


@pytest.fixture(scope='module')
def trained(tiny_run):
    return tiny_run


def rows(path):
    return [json.loads(line) for line in (path / 'eval.jsonl').read_text().splitlines()]


def test_the_evaluators_of_training_on_the_same_checkpoint(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / 'run')
    evaluate.evaluate(path)
    (row,) = rows(path)
    assert (row['step'], row['split']) == (6, 'eval/valid')
    (in_training,) = [
        row for row in workdir.read_metrics(path / 'metrics.jsonl') if (row['step'], row['split']) == (6, 'eval/valid')
    ]
    by_position = row.pop('loss_by_position')
    assert row == in_training
    assert sum(part['tokens'] for part in by_position) == row['tokens']
    assert by_position[0].keys() == {'first', 'last', 'loss', 'tokens'}


@pytest.mark.slow
def test_what_eight_devices_trained_goes_on_on_any_number_of_them(tmp_path):
    program = 'tests.evaluation.on_some_devices'
    report(program, tmp_path / 'half', 8, 2)
    shutil.copytree(tmp_path / 'half', tmp_path / 'whole')
    expected, straight = report(program, tmp_path / 'whole', 8, 4), read_metrics(tmp_path / 'whole')
    # 32 wide: six devices hold three copies of two parts.
    for devices, mesh in ((3, (3, 1)), (5, (5, 1)), (6, (3, 2)), (7, (7, 1))):
        path = shutil.copytree(tmp_path / 'half', tmp_path / str(devices))
        found = report(program, path, devices, 4)
        assert (found['mesh']['data'], found['mesh']['fsdp']) == mesh
        assert found['loss'] == pytest.approx(expected['loss'], rel=1e-5)
        assert found['tokens'] == expected['tokens']
        rows = read_metrics(path)
        assert [(row['step'], row['split']) for row in rows] == [(row['step'], row['split']) for row in straight]
        assert [row['loss'] for row in rows] == pytest.approx([row['loss'] for row in straight], rel=1e-5)


def test_an_evaluator_that_the_config_has_no_entry_for(trained, tmp_path, capsys):
    path = shutil.copytree(trained, tmp_path / 'run')
    told = 'whole_documents:rows=2:block=64'
    evaluate.evaluate(path, evaluators=[told, 'perplexity_by_position'], contexts=[16], max_tokens=400)
    carried, forgotten = (row for row in rows(path) if row['split'] == 'whole_documents/valid')
    assert {row['split'] for row in rows(path)} == {'whole_documents/valid', 'perplexity_by_position/valid'}
    assert carried['context'] > forgotten['context'] == 16
    assert carried['config'] == {'evaluators.whole_documents.rows': 2, 'evaluators.whole_documents.block': 64}
    assert carried['tokens'] == forgotten['tokens'] == 400
    assert all(row['bits_per_byte'] > 0 for row in (carried, forgotten))
    assert (path / 'plots' / 'whole_documents_loss_by_position_step_6.png').is_file()
    assert 'whole_documents/valid_16' in capsys.readouterr().out
    with pytest.raises(UserError, match='did you mean "whole_documents"'):
        evaluate.evaluate(path, evaluators=['whole_document'])


def test_text_that_it_was_not_trained_beside(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / 'run')
    texts = ['Zoë — 漢字', 'a second text']
    (tmp_path / 'texts.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in texts))
    source = f'--config.data.source=jsonl:{tmp_path}/texts.jsonl'
    valid = f'--config.data.valid_source=jsonl:{tmp_path}/texts.jsonl'
    code, out, err = call('eval.py', f'--workdir={path}', source, valid, '--contexts=16,24', '--max_tokens=500')
    assert code == 0, err
    found = rows(path)
    assert [row['bytes'] for row in found] == [sum(len(text.encode()) for text in texts)] * 2
    assert [row['context'] for row in found] == [16, 24]
    assert found[0]['config']['data.source'] == f'jsonl:{tmp_path}/texts.jsonl'
    # The head says what the splits are of.
    assert out.splitlines()[0].endswith(
        f'), jsonl:{tmp_path}/texts.jsonl, valid is jsonl:{tmp_path}/texts.jsonl, bytes'
    )
    assert all(len(line) <= 100 for line in out.splitlines()[1:] if not line.startswith('written'))


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--max_tokens=-5'], '--max_tokens'),
        (['--contexts=0'], '--contexts=0'),
        (['--config.data.sourse=x'], 'did you mean "source"'),
        (['--config.optimizer.learning_rate=1'], 'what can be changed is data, eval, evaluators'),
        (['--config.data.source=text:no_such_file.txt'], 'no_such_file.txt'),
        (['--evaluators=perplexities'], 'did you mean "perplexity"'),
        (['--evaluators='], '--evaluators= names none'),
        (['--contexts='], '--contexts= names none'),
        (['--contexts=9999999999'], 'is not a positive integer below 2**31'),
        (['--evaluators=eval,eval:max_tokens=5'], '"eval" is there twice'),
        (['--evaluators=passkey:text=5'], 'did you mean "texts"'),
        (['--evaluators=passkey:texts=few'], 'want NAME:FIELD=NUMBER'),
        (['--evaluators=passkey:texts=4:texts=2'], '"texts" is there twice'),
        (['--evaluators=passkey:contexts=512'], '"contexts" is not a whole number'),
        (['--evaluators=eval:splits=1'], '"splits" is not a whole number'),
        (['--evaluators=passkey:type=3'], '"type" is not a whole number'),
        (['--evaluators=passkey:digits=19'], 'evaluators.passkey.digits=19: want 1 to 18'),
        (['--evaluators=passkey:texts=100000000000'], 'texts=100000000000: want 1 to 100000'),
        (['--evaluators=perplexity_in_chunk:chunk=-3'], 'chunk=-3: want 0 to'),
        (['--evaluators=perplexity_in_chunk:skip=-5'], 'skip=-5: want 0 to'),
        (['--evaluators=perplexity_in_chunk:skip=48'], 'skip=48 leaves nothing of rows of 48 tokens; want less than'),
        (['--evaluators=eval,perplexity_in_chunk:skip=32', '--contexts=64,32'], 'of rows of 32 tokens'),
        (['--evaluators=whole_documents:rows=0'], 'rows=0: want 1 to'),
        (['--evaluators=passkey'], 'tokens of context, not 48'),
        (['--stream'], 'stream'),
        (['--config.eval.contexts=16,'], '--config.eval.contexts says what training does'),
        (['--config.eval.every_steps=2'], '--config.eval.every_steps says what training does'),
        (['--config.data.shuffle=none'], '--config.data.shuffle is of the order in training'),
        (['--config.eval.max_tokens=9', '--max_tokens=8'], '--max_tokens and --config.eval.max_tokens are the same'),
        (['--evaluators=perplexity', '--config.evaluators.eval.type=perplexity'], 'does nothing: --evaluators='),
    ],
)
def test_bad_input_is_one_line(trained, arguments, message):
    code, _, err = call('eval.py', f'--workdir={trained}', *arguments)
    assert code == 2, err
    assert message in err
    assert err.count('\n') == 1
    assert err.startswith('error: ')
    assert not (trained / 'eval.jsonl').exists()


class Shifted(types.SimpleNamespace):
    """Bytes under another fingerprint, moved up by `by` in the vocabulary."""

    def __init__(self, by):
        from gau.data.tokenizers import load

        own = load('bytes')
        specials = {name: getattr(own, name) for name in ('vocab_size', 'bos_id', 'eos_id', 'pad_id', 'mask_id')}
        super().__init__(**specials, ordinary=own.ordinary, spec=f'shifted:{by}', fingerprint=f'shifted {by}')
        self.encode = lambda text: (own.encode(text) + by) % 256
        self.decode = lambda ids: own.decode([(int(i) - by) % 256 if i < 256 else i for i in ids])


@pytest.mark.parametrize('by', [0, 1])
def test_another_tokenizer_is_refused_unless_it_has_the_same_vocabulary(trained, monkeypatch, by):
    from gau.data import tokenizers

    monkeypatch.setattr(tokenizers, 'load', {'bytes': tokenizers.load('bytes'), 'shifted': Shifted(by)}.get)
    config = workdir.read_config(trained)
    monkeypatch.setattr('gau.training.load.resolve', lambda config: config)
    config.data.tokenizer = 'shifted'
    if by:
        with pytest.raises(UserError, match=r'shifted:1 .*is not the tokenizer that the checkpoint was trained with'):
            load_run(trained, config=config)
    else:
        assert load_run(trained, config=config)[2] == 6
