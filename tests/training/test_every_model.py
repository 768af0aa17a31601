"""Every model of the registry through the real configs, data and step: loss falls in 50 steps."""

import numpy as np
import pytest

from configs import lm, mlm
from gau.data import pipeline
from gau.errors import UserError
from gau.models.architectures import ARCHITECTURES
from gau.training import config as training_config
from gau.training import mesh as meshes
from gau.training.evaluation import put_batch
from gau.training.setup import Run

CASES = [
    (name, objective)
    for name, architecture in ARCHITECTURES.items()
    for objective in ('lm', 'mlm')
    if not (objective == 'lm' and architecture.not_causal)
]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'objective'), CASES)
def test_loss_falls_in_50_steps(name, objective):
    config = {'lm': lm, 'mlm': mlm}[objective].get_config(f'model={name},runlocal')
    config.model.num_layers = 2
    config.model.model_dim = 64
    config.steps = 50
    config.optimizer.learning_rate = 3e-3
    config = training_config.resolve(config)
    run = Run.from_config(config)
    state, train_step = run.init_state(), run.train_step()
    batches = pipeline.train_iterator(config.data, objective=objective, tokenizer=run.tokenizer, seed=0)
    losses = []
    with run.context():
        for _ in range(50):
            state, metrics = train_step(state, put_batch(next(batches), meshes.batch_sharding(run.mesh)))
            losses.append(float(metrics['loss']))
    assert np.isfinite(losses).all()
    # From about log 260 = 5.56, uniform over bytes, to at most what the frequencies of single bytes give (about 3.4).
    assert losses[0] > 5.0
    assert np.mean(losses[-5:]) < 4.0


def test_linformer_is_refused_as_a_causal_model():
    with pytest.raises(UserError, match='linformer cannot be a causal language model'):
        training_config.resolve(lm.get_config('model=linformer,runlocal'))
