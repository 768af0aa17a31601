"""Cells: how they are written, in which order they are measured, and what is refused."""

import dataclasses
import json

import pytest

from gau.benchmarks import cells
from gau.benchmarks.cells import Cell, Spec, label, parse_spec, plan
from gau.errors import UserError

DEFAULTS = {'impls': ['auto'], 'remat': 'none', 'layer_stack': 'unrolled'}
PLAN = {
    'kinds': ['train'],
    'contexts': {kind: [64, 256] for kind in cells.KINDS},
    'tokens_per_step': 128,
    'batch_sizes': [1, 4],
    'matmul_edge': 32,
    'memory_mib': 8,
    'size': 'tiny',
}


@pytest.mark.parametrize(
    ('text', 'specs'),
    [
        ('flash', [Spec('flash', 'reference'), Spec('flash', 'xla')]),
        ('flash:xla', [Spec('flash', 'xla')]),
        ('flash:xla:full:scan:4', [Spec('flash', 'xla', 'full', 'scan', 4)]),
        ('flash:xla::::64', [Spec('flash', 'xla', segment_tokens=64)]),
        ('torch_transformer_plus_plus', [Spec('torch_transformer_plus_plus', 'compiled', None, None)]),
        ('torch_flash_lucidrains:eager:::2', [Spec('torch_flash_lucidrains', 'eager', None, None, 2)]),
    ],
)
def test_a_spec_and_its_label(text, specs):
    assert parse_spec(text, **DEFAULTS | {'impls': ['reference', 'xla']}) == specs
    for spec in specs:
        assert parse_spec(label(spec._asdict()), **DEFAULTS) == [spec]


def test_what_a_spec_leaves_open_comes_from_the_flags():
    (spec,) = parse_spec('flash:::scan', impls=['xla'], remat='dots', layer_stack='unrolled')
    assert spec == Spec('flash', 'xla', 'dots', 'scan')
    assert label(Spec('flash', 'auto', 'none', 'unrolled', 1)._asdict()) == 'flash'


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('flsh', 'did you mean "flash"'),
        ('flash:xlaa', 'did you mean "xla"'),
        ('flash:xla:half', '"half" does not exist'),
        ('flash:xla:none:scan:0', 'not a positive integer'),
        ('flash:xla:none:scan:1:1:1', 'at most'),
        ('torch_flash_lucidrains:xla', '"xla" does not exist'),
        ('torch_flash_lucidrains:eager:full', 'has no remat'),
    ],
)
def test_what_a_spec_may_not_say(text, message):
    with pytest.raises(UserError, match=message):
        parse_spec(text, **DEFAULTS)


def test_a_round_puts_what_is_compared_side_by_side():
    specs = [Spec('flash'), Spec('transformer_plus_plus')]
    planned = plan(specs, **PLAN)
    assert [(cell.benchmark, cell.spec.model, cell.context, cell.batch_size) for cell in planned] == [
        ('matmul', 'matmul', 32, 1),
        ('train', 'flash', 64, 2),
        ('train', 'transformer_plus_plus', 64, 2),
        ('train', 'flash', 256, 1),
        ('train', 'transformer_plus_plus', 256, 1),
    ]
    planned = plan([Spec('flash'), Spec('flash')], **PLAN | {'kinds': ['decode', 'prefill']})
    assert [(cell.benchmark, cell.context, cell.batch_size) for cell in planned] == [
        ('memory', 8, 1),
        ('decode', 64, 1),
        ('decode', 64, 4),
        ('decode', 256, 1),
        ('decode', 256, 4),
        ('prefill', 64, 1),
        ('prefill', 256, 1),
    ]


def test_a_spec_may_have_contexts_of_its_own():
    own = {Spec('flash_quad'): [256, 32], Spec('combiner'): [64], Spec('flash'): [32]}
    planned = plan([Spec('flash')], **PLAN, own_contexts=own)
    assert [(cell.spec.model, cell.context) for cell in planned[1:]] == [
        ('flash', 64),
        ('combiner', 64),
        ('flash', 256),
        ('flash_quad', 256),
        ('flash', 32),
        ('flash_quad', 32),
    ]


@pytest.mark.parametrize(
    ('spec', 'changes', 'message'),
    [
        (Spec('flash'), {'kinds': ['trian']}, 'did you mean "train"'),
        (Spec('flash'), {'size': 'huge'}, '--size'),
        (Spec('flash'), {'objective': 'ml'}, '--objective'),
        (Spec('flash', 'xla'), {'kinds': ['decode']}, 'by name alone'),
        (Spec('torch_flash_lucidrains', 'compiled', None, None), {'kinds': ['decode']}, 'know train and forward'),
        (Spec('flash', accumulation_steps=2), {'kinds': ['forward']}, 'speaks to train only'),
        (Spec('flash', segment_tokens=64), {'kinds': ['forward']}, 'speaks to train only'),
    ],
)
def test_what_a_plan_refuses(spec, changes, message):
    with pytest.raises(UserError, match=message):
        plan([spec], **PLAN | changes)


def test_a_cell_travels_as_json():
    cell = Cell('train', Spec('flash', 'xla'), 'tiny', context=64, batch_size=2, packed=True)
    assert Cell.from_dict(json.loads(json.dumps(dataclasses.asdict(cell)))) == cell


def test_a_baseline_is_counted_by_our_model_of_its_shape():
    ours = Cell('train', Spec('flash'), 'base', context=8192, batch_size=8)
    theirs = dataclasses.replace(ours, spec=Spec('torch_flash_lucidrains', 'compiled', None, None))
    assert theirs.flops_per_token() == ours.flops_per_token() > 1e8
    with pytest.raises(UserError, match='impl=xla does not exist for combiner'):
        dataclasses.replace(ours, spec=Spec('combiner', 'xla')).model_config()
