"""scripts/sample.py as a user calls it."""

import json
import subprocess

import pytest

from tests.programs import call
from tests.training.test_commands import TINY, run, start


@pytest.fixture(scope='module')
def trained(tiny_run):
    return tiny_run


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['scripts/sample.py', '--workdir=nowhere'], 'nowhere'),
        (['scripts/sample.py', '--workdir=nowhere', '--top_p=0'], 'top_p=0'),
        (['scripts/sample.py', '--workdir=nowhere', '--prompt=a', '--interactive'], '--prompt and --interactive'),
        (['scripts/sample.py', '--workdir=nowhere', '--prompt_file=missing.txt'], 'missing.txt'),
        (['scripts/sample.py', '--workdir=nowhere', '--max_tokens=0'], '--max_tokens=0 writes nothing'),
        (['scripts/sample.py', '--workdir=nowhere', '--save_state=nowhere/state'], 'there is no directory nowhere'),
        (['scripts/sample.py', '--workdir=nowhere', '--tensor=4097'], 'split over 4097 devices'),
        (['scripts/sample.py', '--workdir=nowhere', '--tensor=2', '--devices=2'], '--devices, which spreads'),
    ],
)
def test_bad_input_is_one_line(arguments, message):
    code, out, err = call(*arguments)
    assert (code, out) == (2, '')
    assert message in err
    assert err.count('\n') == 1


def test_the_likeliest_text_of_a_file_as_json(trained, tmp_path):
    prompt = 'Zoë — 漢字\n'
    (tmp_path / 'prompt.txt').write_text(prompt, encoding='utf-8')
    arguments = [f'--prompt_file={tmp_path / "prompt.txt"}', '--num=2', '--max_tokens=70', '--temperature=0', '--json']
    arguments.append(f'--save_state={tmp_path / "state"}')
    code, out, err = call('scripts/sample.py', f'--workdir={trained}', *arguments)
    assert code == 0, err
    first, second = (json.loads(line) for line in out.splitlines())
    assert first == second
    assert first.keys() == {'prompt', 'text', 'tokens', 'finished'}
    assert first['prompt'] == prompt
    # Two rows, whose first blocks of 32 are not timed; the prompt is read once, with BOS.
    assert '; wrote 140 tokens, after the first 64 at ' in err or first['finished']
    assert err.startswith(f'read {len(prompt.encode()) + 1} tokens at ')
    # What was read is gone on from, in every line of a file.
    lines = tmp_path / 'prompts.jsonl'
    lines.write_text('{"prompt": ""}\n\n{"prompt": "b\u2028"}\n{"prompt": ""}\n', encoding='utf-8')
    ask = ['scripts/sample.py', f'--workdir={trained}', f'--state={tmp_path / "state"}', '--temperature=0']
    code, out, err = call(*ask, f'--prompts={lines}', '--batch_size=2', '--max_tokens=70')
    assert code == 0, err
    asked = [json.loads(line) for line in out.strip().split('\n')]
    assert [record['prompt'] for record in asked] == ['', 'b\u2028', '']
    assert asked[0]['text'] == asked[2]['text'] == first['text']
    read = ['scripts/sample.py', f'--workdir={trained}', '--prompt=long', '--max_tokens=0']
    code, out, err = call(*read, f'--save_state={tmp_path / "long.state"}')
    assert (code, out, err.count('\n')) == (0, '', 1), err
    assert err.startswith('read 5 tokens at ')
    lines.write_text('{"prompt": ""}\n{"text": "b"}\n')
    code, out, err = call('scripts/sample.py', f'--workdir={trained}', f'--prompts={lines}')
    assert (code, out, err.count('\n')) == (2, '', 1), err
    assert 'prompts.jsonl:2 has no "prompt"' in err


def test_interactive_writes_each_line_on_by_the_same_seed(trained):
    arguments = ['--interactive', '--max_tokens=20', '--top_k=50', '--top_p=0.95', '--stop=e', '--seed=3']
    process = start('scripts/sample.py', f'--workdir={trained}', *arguments, stdin=subprocess.PIPE)
    out, err = process.communicate('né\nné\n\n', timeout=1200)
    assert process.returncode == 0, err
    assert out.endswith('> ')
    size = len(out.removesuffix('> ')) // 2
    assert out[:size] == out[size : 2 * size]
    assert out.startswith('> né')
    assert 'e' not in out
    assert err.count('read 4 tokens at ') == 2


@pytest.mark.slow
def test_the_seed_decides_what_is_written(tmp_path):
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
