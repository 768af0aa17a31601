"""Every named config, resolved and compared with its text in golden/, so that a changed default shows in a diff.

After a change that is meant: python -m tests.configs.test_configs writes the files anew.
"""

import importlib
import json
from pathlib import Path

import pytest

from configs import common
from gau.errors import UserError
from gau.training import config as training_config

GOLDEN = Path(__file__).parent / 'golden'
NAMED = {
    'quickstart': ('quickstart', ''),
    'lm_flash_base_8192': ('lm', 'model=flash,size=base,context=8192,data=embedded'),
    'lm_flash_quad_base_512': ('lm', 'model=flash_quad,size=base,context=512,data=embedded'),
    'lm_transformer_plus_plus_base_1024': ('lm', 'model=transformer_plus_plus,size=base,data=embedded'),
    'lm_runlocal': ('lm', 'runlocal'),
    'lm_flash_quad_paper_512': ('lm', 'model=flash_quad,recipe=paper,context=512,data=embedded'),
    'mlm_flash_base_512': ('mlm', 'data=embedded'),
    'mlm_runlocal': ('mlm', 'runlocal'),
}


def dump(name: str) -> str:
    """Returns the resolved config as sorted JSON."""
    program, arg = NAMED[name]
    config = training_config.resolve(importlib.import_module(f'configs.{program}').get_config(arg))
    return json.dumps(json.loads(config.to_json()), indent=1, sort_keys=True) + '\n'


@pytest.mark.parametrize('name', NAMED)
def test_named_config_is_as_written_down(name):
    assert dump(name) == (GOLDEN / f'{name}.json').read_text(), 'meant? then run python -m tests.configs.test_configs'


def test_resolving_twice_changes_nothing():
    config = training_config.resolve(training_config.default_config())
    assert training_config.resolve(config) == config


def test_arguments_are_typed_and_known():
    arg = common.parse_arg('model=x,runlocal', model='flash', context=512)
    assert (arg.model, arg.context, arg.runlocal) == ('x', 512, True)
    with pytest.raises(UserError, match='did you mean "context"'):
        common.parse_arg('contxt=3', context=512)
    with pytest.raises(UserError, match='context=many: want int'):
        common.parse_arg('context=many', context=512)
    with pytest.raises(UserError, match='want true or false'):
        common.parse_arg('runlocal=perhaps')


@pytest.mark.parametrize('context', [512, 1024, 2048, 4096, 8192])
def test_tokens_per_step_do_not_depend_on_the_context(context):
    config = importlib.import_module('configs.lm').get_config(f'context={context}')
    assert config.data.batch_size * config.data.context == common.TOKENS_PER_STEP


if __name__ == '__main__':
    for golden_name in NAMED:
        (GOLDEN / f'{golden_name}.json').write_text(dump(golden_name))
