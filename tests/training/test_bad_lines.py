"""A document that cannot be taken, met in mid-epoch, costs no work and can be left out on resume."""

import pytest

from gau.errors import UserError
from gau.training.loop import train
from tests.data.conftest import make_texts, write_jsonl
from tests.training.tiny import read_metrics, tiny_config


@pytest.mark.slow
def test_a_held_out_line_costs_no_work_either(tmp_path):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(60))
    (tmp_path / 'v.jsonl').write_text('{"text": "fine"}\n{"text": 3}\n{"text": "fine"}\n')

    def config(bad_lines):
        return tiny_config(
            model__num_layers=1, data__source=f'jsonl:{path}', data__valid_source=f'jsonl:{tmp_path}/v.jsonl',
            data__bad_lines=bad_lines, checkpoint__every_steps=6,
        )  # fmt: skip

    with pytest.raises(UserError, match=r'v.jsonl:2: .*; saved at step 4, where'):
        train(config('error'), tmp_path / 'run')
    train(config('skip'), tmp_path / 'run')
    train(config('skip'), tmp_path / 'undisturbed')
    assert read_metrics(tmp_path / 'run') == read_metrics(tmp_path / 'undisturbed')


@pytest.mark.parametrize('streams', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_run_is_saved_and_goes_on_without_the_line(tmp_path, streams):
    path = write_jsonl(tmp_path / 'a.jsonl', make_texts(60, longest=4))
    lines = path.read_text('utf-8').splitlines()
    lines[43] = '{"text": null}'
    path.write_text('\n'.join(lines), 'utf-8')

    def config(bad_lines):
        return tiny_config(
            model__num_layers=1, steps=40, checkpoint__every_steps=40, eval__every_steps=40, data__streams=streams,
            data__source=f'jsonl:{path}', data__shuffle='none', data__bad_lines=bad_lines, data__packing='document',
        )  # fmt: skip

    with pytest.raises(
        UserError, match=r'a.jsonl:44: .*data.bad_lines="skip" .*; saved at step (\d+), where'
    ) as stopped:
        train(config('error'), tmp_path / 'run')
    step = int(str(stopped.value).partition('saved at step ')[2].partition(',')[0])
    assert 5 < step < 40
    # Nothing changes by trying again.
    with pytest.raises(UserError, match=rf'saved at step {step}, where'):
        train(config('error'), tmp_path / 'run')
    train(config('skip'), tmp_path / 'run')
    train(config('skip'), tmp_path / 'undisturbed')
    assert read_metrics(tmp_path / 'run') == read_metrics(tmp_path / 'undisturbed')
