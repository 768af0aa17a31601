"""The baselines in PyTorch, where it is installed (requirements-benchmark.txt)."""

import pytest

from gau.benchmarks.cells import Cell, Spec
from gau.models import counts

torch = pytest.importorskip('torch', reason='the baselines need torch, which is no requirement of this repository')
pytest.importorskip('flash_pytorch', reason='the baseline is FLASH-pytorch==0.1.9; it is not installed')
from gau.benchmarks import torch_baselines  # noqa: E402
from gau.errors import UserError  # noqa: E402

MODELS = ('torch_flash_lucidrains', 'torch_transformer_plus_plus')
FIELDS = {'size': 'tiny', 'context': 32, 'batch_size': 2, 'vocab_size': 50, 'dtype': 'float32', 'effort': 'quick'}


def cell(model, kind='train', **changes):
    steps = changes.pop('accumulation_steps', 1)
    return Cell(kind, Spec(model, 'eager', None, None, steps), **FIELDS | changes)


@pytest.mark.parametrize('model', MODELS)
@pytest.mark.parametrize('kind', ['train', 'forward'])
def test_a_baseline_is_measured(model, kind):
    result = {}
    torch_baselines.measure(cell(model, kind), result)
    assert len(result['seconds']) >= 10
    assert 0 < result['loss'] < 20
    assert result['tokens'] == 64


def test_transformer_plus_plus_has_our_parameters_and_is_causal():
    own = cell('torch_transformer_plus_plus')
    config = own.model_config()
    model = torch_baselines.TransformerPlusPlus(config, own)
    # Ours scales a sinusoid by one number more.
    assert sum(p.numel() for p in model.parameters()) == counts.parameters(config, vocab_size=50) - 1
    tokens = torch.arange(32)[None]
    changed = tokens.clone()
    changed[0, 20:] = 7
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:20], after[:20])
    assert not torch.allclose(before[20:], after[20:])


def test_micro_batches_give_the_gradient_of_the_whole_batch():
    gradients = []
    for steps in (1, 2):
        own = cell('torch_transformer_plus_plus', objective='mlm', accumulation_steps=steps)
        torch.manual_seed(0)
        model = torch_baselines.TransformerPlusPlus(own.model_config(), own)
        torch_baselines._train_step(own, model, 'cpu')(*torch_baselines._batches(own, 'cpu')[0])
        gradients.append(model.blocks[0].qkv.weight.grad)
    torch.testing.assert_close(*gradients)


def test_packed_documents_and_muon_are_refused():
    with pytest.raises(UserError, match='packed'):
        torch_baselines.measure(cell(MODELS[0], packed=True), {})
    with pytest.raises(UserError, match='trained with adamw, not muon'):
        torch_baselines.measure(cell(MODELS[0], optimizer='muon'), {})
