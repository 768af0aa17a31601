"""Config programs with faults in them: one line that says where, and no traceback."""

import os
import subprocess
import sys

import pytest

from configs import common
from gau.errors import UserError

SCRIPT = 'from gau import cli; cli.define_config(); cli.run(lambda: print(cli.load_config().steps))'
RIGHT = 'from gau.training import config\n\n\ndef get_config(arg=None):\n    c = config.default_config()\n'


def run(*arguments):
    return subprocess.run([sys.executable, '-c', SCRIPT, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(
    ('program', 'argument', 'message'),
    [
        (
            'def get_configs():\n    pass\n',
            '',
            'a.py: a config program defines get_config(arg=None), and this one has none',
        ),
        (
            RIGHT + '    c.steps = half(0)\n    return c\n\n\ndef half(x):\n    return 1 / x\n',
            '',
            'a.py:11: ZeroDivisionError: divi',
        ),
        (RIGHT + '    return c.modell.name\n', '', 'a.py:6: AttributeError: '),
        (RIGHT + "    return c['modell']\n", '', 'a.py:6: KeyError: '),
        (RIGHT + "    return open('/none')\n", '', 'a.py:6: FileNotFoundError: '),
        (RIGHT + "    raise ValueError('no such mood')\n", ':x=1', 'a.py:6: ValueError: no such mood'),
        (RIGHT, '', 'a.py: get_config() returned NoneType, where a ConfigDict is expected'),
        (RIGHT + "    return {'steps': 1}\n", '', 'a.py: get_config() returned dict, where a ConfigDict is expected'),
        ('def get_config(arg=None)\n    pass\n', '', "a.py:1: expected ':'"),
        ('import none_of_that_name\n', '', 'a.py:1: ModuleNotFoundError: '),
        ('def get_config():\n    pass\n', ':x=1', 'get_config() takes 0 positional arguments but 1 was given'),
    ],
)
def test_the_line_is_named(tmp_path, program, argument, message):
    (tmp_path / 'a.py').write_text(program)
    result = run(f'--config={tmp_path}/a.py{argument}')
    assert message in result.stderr
    assert (result.returncode, result.stderr.count('\n'), result.stdout) == (2, 1, '')


def test_a_right_one_is_no_fault(tmp_path):
    (tmp_path / 'a.py').write_text(RIGHT + '    return c\n')
    assert run(f'--config={tmp_path}/a.py', '--config.steps=7').stdout == '7\n'
    result = run(f'--config={tmp_path}/a.py', '--config.stepps=7')
    assert result.stderr == 'error: --config.stepps: unknown config field "stepps"; did you mean "steps"?\n'
    result = run(f'--config={tmp_path}/a.py', '--config.model.head_decay=1')
    assert 'unknown config field "head_decay"; it is gone, docs/results/heads.md names a commit' in result.stderr


def test_numbers_and_truth_are_read_as_people_write_them(tmp_path):
    cap = '    c.eval.max_tokens, c.data.tokenizer, c.tokens, c.steps = 5, "sentencepiece:x", 7, None\n    return c\n'
    (tmp_path / 'a.py').write_text(RIGHT + cap)
    show = 'c.tokens, c.data.attend_across_documents, c.eval.max_tokens, c.data.tokenizer, c.epochs'
    script = SCRIPT.replace('print(cli.load_config().steps)', f'print(*(lambda c: [{show}])(cli.load_config()))')

    def read(*given):
        arguments = [f'--config.{argument}' for argument in given]
        return subprocess.run(
            [sys.executable, '-c', script, f'--config={tmp_path}/a.py', *arguments], capture_output=True, text=True
        )

    empty = ['eval.max_tokens=None', 'data.tokenizer=None', 'epochs=None']
    assert read('tokens=1e6', 'data.attend_across_documents=yes', *empty).stdout.split()[:2] == ['1000000', 'True']
    for argument, message in (
        ('tokens=1.5e0', 'not a whole number'),
        ('tokens=1e999999999', 'below 10**19'),
        ('tokens=many', 'not a number'),
        ('data.batch_size=None', '--config.data.batch_size=None: it must have a value; the default is 8'),
        ('data.attend_across_documents=perhaps', 'perhaps'),
    ):
        result = read(argument)
        assert message in result.stderr, result.stderr
        assert (result.returncode, result.stderr.count('\n'), result.stdout) == (2, 1, '')


@pytest.mark.parametrize(
    ('program', 'environment', 'code', 'out', 'err'),
    [
        ("print('Zoë 漢')", {'PYTHONIOENCODING': 'ascii'}, 0, 'Zo\\xeb \\u6f22\n', ''),
        ('import jax; jax.devices()', {'JAX_PLATFORMS': 'cuda'}, 1, '', 'the platform of JAX_PLATFORMS=cuda'),
        ('import jax; jax.numpy.zeros(2**50).sum()', {'JAX_PLATFORMS': 'cpu'}, 1, '', 'error: out of memory (Out of'),
        (
            'import jax; jax.numpy.zeros(2**50).sum()',
            {'JAX_PLATFORMS': 'cpu', 'XLA_PYTHON_CLIENT_MEM_FRACTION': '.02'},
            *(1, '', 'error: out of memory of the share of the device that XLA_PYTHON_CLIENT_MEM_FRACTION=.02 gives'),
        ),
        ('raise MemoryError("373 GiB")', {}, 1, '', 'error: out of memory (373 GiB)\n'),
        ("open('/dev/full', 'w').write('x' * 99999)", {}, 1, '', 'no space left'),
        # As Orbax leaves them behind where a write failed: Python tells of them when the program ends.
        ("globals().update(a=asyncio.sleep(1)); raise MemoryError('x')", {}, 1, '', 'error: out of memory (x)\n'),
        ("raise OSError(30, 'Read-only file system', 'a/b')", {}, 1, '', 'error: a/b: Read-only file system'),
    ],
)  # fmt: skip
def test_what_the_machine_cannot_do_is_one_line(program, environment, code, out, err):
    script = f'import asyncio\nfrom gau import cli\ndef main():\n    {program}\ncli.run(main)'
    result = subprocess.run(
        [sys.executable, '-c', script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert (result.returncode, result.stdout) == (code, out), result.stderr
    assert err in result.stderr
    assert result.stderr.count('\n') == code


def test_a_reader_that_has_seen_enough_gets_no_traceback():
    script = "from gau import cli; cli.run(lambda: [print('line ' * 99) for _ in range(9999)] and None)"
    command = f'{sys.executable} -c "{script}" | head -1'
    result = subprocess.run(['bash', '-o', 'pipefail', '-c', command], capture_output=True, text=True)
    assert result.stdout == 'line ' * 99 + '\n'
    assert (result.stderr, result.returncode) == ('', 1)


@pytest.mark.parametrize(
    ('arg', 'data', 'given'),
    [
        ('data=text:a.txt,b.txt', 'text:a.txt,b.txt', ('data',)),
        ('data=text:a.txt,b=1.txt,runlocal,context=8', 'text:a.txt,b=1.txt', ('data', 'runlocal', 'context')),
        ('context=8,data=jsonl:a,b,c', 'jsonl:a,b,c', ('context', 'data')),
        ('data=wiki40b,runlocal', 'wiki40b', ('data', 'runlocal')),
        (',', 'none', ()),
    ],
)
def test_a_list_of_files_may_hold_commas(arg, data, given):
    found = common.parse_arg(arg, data='none', context=1)
    assert (found.data, found.given) == (data, given)


@pytest.mark.parametrize('arg', ['data=text:a.txt,runlocl', 'data=text:a.txt,contxt=3', 'data=wiki40b,b.txt', 'b.txt'])
def test_other_names_stay_errors(arg):
    with pytest.raises(UserError, match='unknown config argument'):
        common.parse_arg(arg, data='none', context=1)
