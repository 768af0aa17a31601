"""Every model through the real configs, data and step: its loss falls, and falls as it did at commit e74d9a2.

Bit by bit where the machine is the one that the golden losses were made on (tests/training/golden), nearly elsewhere.
"""

import numpy as np
import pytest

from configs import lm
from gau.errors import UserError
from gau.training import config as training_config
from tests.programs import report
from tests.training import golden

# What continuous integration runs: gated units and a Transformer, both objectives.
IN_CI = (('lm', 'flash'), ('mlm', 'transformer_plus_plus'))


@pytest.fixture(scope='module')
def losses_of(request):
    """The losses of the cases that run, by objective/model: made in one process, which compiles as users do."""
    chosen = [item.callspec.params for item in request.session.items if 'losses_of' in item.fixturenames]
    return report('tests.training.golden', *(f'{case["objective"]}/{case["name"]}' for case in chosen))


@pytest.mark.parametrize(
    ('objective', 'name'),
    [pytest.param(*case, marks=() if case in IN_CI else pytest.mark.slow) for case in golden.CASES],
)
def test_losses_are_those_of_the_golden_file(losses_of, objective, name):
    losses = losses_of[f'{objective}/{name}']
    assert np.isfinite(losses).all()
    # From about log 260 = 5.56, uniform over bytes, to at most what the frequencies of single bytes give (about 3.4).
    assert losses[0] > 5.0
    assert np.mean(losses[-5:]) < 4.0
    kept = golden.read()
    if golden.corpus() != kept['corpus']:
        pytest.skip(f'the golden losses were made on the corpus of {kept["corpus"]}; here it is {golden.corpus()}')
    expected = kept['losses'][f'{objective}/{name}']
    if golden.environment() == kept['environment']:
        assert losses == expected
    else:
        np.testing.assert_allclose(losses, expected, atol=2e-3)


def test_linformer_is_refused_as_a_causal_model():
    with pytest.raises(UserError, match='linformer cannot be a causal language model'):
        training_config.resolve(lm.get_config('model=linformer,runlocal'))
