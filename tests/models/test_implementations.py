from types import SimpleNamespace

import jax
import pytest

from gau.errors import UserError
from gau.models import implementations
from gau.models.architectures import ARCHITECTURES
from gau.models.config import ENUMS
from gau.models.implementations import Target, select_implementation
from gau.models.registry import build
from tests.models.tiny import CAUSAL, tiny_config

CPU, TPU, HOPPER = Target('cpu'), Target('tpu'), Target('gpu', (9, 0))


@pytest.mark.parametrize('name', CAUSAL)
def test_auto_on_a_cpu_is_xla_where_there_is_one(name):
    config = tiny_config(name)
    assert config.impl == 'auto'
    expected = 'reference' if name == 'combiner' else 'xla'
    assert select_implementation(config, target=CPU) == expected
    model = build(config, vocab_size=3, causal=True)
    assert model.config.impl == expected
    assert config.impl == 'auto', 'the config itself says what was asked for'


def test_what_was_chosen_is_taken():
    assert select_implementation(tiny_config('flash', impl='reference'), target=CPU) == 'reference'


def test_auto_takes_the_first_that_works_and_a_choice_that_does_not_is_refused(monkeypatch):
    def fast(config, target):
        return None if target.compute_capability == (9, 0) else f'a Hopper GPU, this is {target.platform}'

    monkeypatch.setitem(implementations.WHY_NOT, 'fast', fast)
    architecture = ARCHITECTURES['flash']
    table = dict(ARCHITECTURES) | {'flash': architecture._replace(impls=('fast', *architecture.impls))}
    monkeypatch.setattr(implementations, 'ARCHITECTURES', table)
    config = tiny_config('flash')
    assert select_implementation(config, target=HOPPER) == 'fast'
    assert select_implementation(config, target=TPU) == 'xla'
    config.impl = 'fast'
    with pytest.raises(UserError, match=r'^model.impl=fast needs a Hopper GPU, this is tpu$'):
        select_implementation(config, target=TPU)


def test_every_implementation_has_an_entry_and_works_somewhere():
    named = {impl for architecture in ARCHITECTURES.values() for impl in architecture.impls}
    assert named == set(implementations.WHY_NOT) == set(ENUMS['impl']) - {'auto'}


@pytest.mark.parametrize(('attributes', 'expected'), [
    ({'platform': 'gpu', 'compute_capability': '9.0'}, Target('gpu', (9, 0), 2)),
    ({'platform': 'gpu', 'compute_capability': '12.1'}, Target('gpu', (12, 1), 2)),
    ({'platform': 'gpu', 'compute_capability': 'gfx942'}, Target('gpu', None, 2)),
    ({'platform': 'tpu'}, Target('tpu', None, 2)),
], ids=str)  # fmt: skip
def test_target_of_a_device(attributes, expected):
    assert Target.of_device(SimpleNamespace(**attributes), sequence_shards=2) == expected


def test_the_default_target_is_the_device_at_hand():
    assert Target.of_device(jax.devices()[0]) == CPU
