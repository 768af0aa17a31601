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
        (
            'flash:xla:key_input=shifted:chunk_size=128:dropout_rate=1e-1',
            [
                Spec(
                    'flash',
                    'xla',
                    overrides=(('chunk_size', 128), ('dropout_rate', 0.1), ('key_input', 'shifted')),
                )
            ],
        ),
        ('torch_transformer_plus_plus', [Spec('torch_transformer_plus_plus', 'compiled', None, None)]),
        ('torch_flash_lucidrains:eager:::2', [Spec('torch_flash_lucidrains', 'eager', None, None, 2)]),
    ],
)
def test_a_spec_and_its_label(text, specs):
    assert parse_spec(text, **DEFAULTS | {'impls': ['reference', 'xla']}) == specs
    for spec in specs:
        row = spec._asdict() | {'overrides': dict(spec.overrides)}
        assert parse_spec(label(row), **DEFAULTS) == [spec]


def test_what_a_spec_leaves_open_comes_from_the_flags():
    (spec,) = parse_spec('flash:::scan', impls=['xla'], remat='dots', layer_stack='unrolled')
    assert spec == Spec('flash', 'xla', 'dots', 'scan')
    # A row of before there were segments and overrides.
    row = {'model': 'flash', 'impl': 'auto', 'remat': 'none', 'layer_stack': 'unrolled', 'accumulation_steps': 1}
    assert label(row) == 'flash'


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
        ('torch_flash_lucidrains:chunk_size=64', 'has no chunk_size'),
        ('flash:key_inptu=shifted', 'did you mean "key_input"'),
        ('flash:key_input=shfted', 'did you mean "shifted"'),
        ('flash:chunk_size=0', 'must be at least 1'),
        ('flash:chunk_size=many', 'chunk_size=many: want int'),
        ('flash:chunk_size=64:chunk_size=64', 'set twice'),
        ('flash:chunk_size=64:xla', '"xla" stands behind'),
        ('flash:remat=full', 'a part of its own'),
        ('transformer_plus_plus:chunk_size=64', 'has no chunk_size'),
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
        (Spec('flash', 'xla'), {'kinds': ['decode']}, 'by name and field=value alone'),
        (Spec('torch_flash_lucidrains', 'compiled', None, None), {'kinds': ['decode']}, 'know train and forward'),
        (Spec('flash', accumulation_steps=2), {'kinds': ['forward']}, 'speaks to train only'),
        (Spec('flash', segment_tokens=64), {'kinds': ['forward']}, 'speaks to train only'),
    ],
)
def test_what_a_plan_refuses(spec, changes, message):
    with pytest.raises(UserError, match=message):
        plan([spec], **PLAN | changes)


def test_a_cell_travels_as_json():
    spec = Spec('flash', 'xla', overrides=(('chunk_size', 32), ('key_input', 'shifted')))
    cell = Cell('decode', spec, 'tiny', context=64, batch_size=2)
    assert Cell.from_dict(json.loads(json.dumps(dataclasses.asdict(cell)))) == cell
    config = cell.model_config()
    assert (config.impl, config.chunk_size, config.key_input) == ('xla', 32, 'shifted')
    assert cell.flops_per_token() != dataclasses.replace(cell, spec=Spec('flash', 'xla')).flops_per_token()


def test_a_baseline_is_counted_by_our_model_of_its_shape():
    ours = Cell('train', Spec('flash'), 'base', context=8192, batch_size=8)
    theirs = dataclasses.replace(ours, spec=Spec('torch_flash_lucidrains', 'compiled', None, None))
    assert theirs.flops_per_token() == ours.flops_per_token() > 1e8
    with pytest.raises(UserError, match='impl=xla does not exist for combiner'):
        dataclasses.replace(ours, spec=Spec('combiner', 'xla')).model_config()
