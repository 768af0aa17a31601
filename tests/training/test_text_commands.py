"""sample.py and eval.py --stream as a user calls them."""

import json

import pytest

from tests.training.test_commands import TINY, run


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['scripts/sample.py', '--workdir=nowhere'], 'nowhere'),
        (['scripts/sample.py', '--workdir=nowhere', '--top_p=0'], '--top_p=0'),
        (['scripts/sample.py', '--workdir=nowhere', '--prompt=a', '--interactive'], '--prompt and --interactive'),
        (['scripts/sample.py', '--workdir=nowhere', '--prompt_file=missing.txt'], 'missing.txt'),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    code, out, err = run(*arguments)
    assert (code, out) == (2, '')
    assert message in err
    assert err.count('\n') == 1


@pytest.mark.slow
def test_sampling_and_streaming_of_a_run(tmp_path):
    code, _, err = run('train.py', *TINY, f'--workdir={tmp_path}')
    assert code == 0, err
    sample = ['scripts/sample.py', f'--workdir={tmp_path}', '--prompt=dé', '--max_tokens=50', '--seed=3']
    code, text, err = run(*sample)
    assert code == 0, err
    assert text.startswith('dé')
    assert 'tokens/s' in err
    code, lines, _ = run(*sample, '--json', '--num=2')
    first, second = (json.loads(line) for line in lines.splitlines())
    assert first['prompt'] + first['text'] + '\n' == text
    assert first['text'] != second['text']
    assert run(*sample, '--json', '--num=2')[1] == lines
    code, out, err = run('eval.py', f'--workdir={tmp_path}', '--stream', '--contexts=32', '--max_tokens=400')
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / 'eval.jsonl').read_text().splitlines()]
    assert [row['split'] for row in rows] == ['stream/valid'] * 2
    assert rows[0]['context'] > rows[1]['context'] == 32
    assert out.count('valid') >= 2
