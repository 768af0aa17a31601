"""A toy task that is no language model, in one file: which half of the numbers a sequence has more of.

Its rows are made here and not of documents, its labels stand beside whole sequences, its model has a head of two
classes, and its evaluator counts right answers.
"""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from gau.data import config as data_config
from gau.errors import UserError
from gau.evaluation.evaluator import BatchEvaluator
from gau.models import registry
from gau.objectives.objective import Objective

NUMBERS = 16


class Classifier(nn.Module):
    """The blocks of any bidirectional model, the mean over the sequence, and two classes."""

    trunk: nn.Module

    @property
    def config(self):
        return self.trunk.config

    @property
    def implementation(self):
        return self.trunk.implementation

    @nn.compact
    def __call__(self, inputs_BN, *, deterministic=True):
        h_BND = self.trunk.hidden(inputs_BN, deterministic=deterministic)
        kernel = nn.with_logical_partitioning(nn.initializers.lecun_normal(), ('embed', None))
        return nn.Dense(2, kernel_init=kernel, name='head')(h_BND.astype(jnp.float32).mean(axis=1))


class Halves(Objective):
    causal = False
    evaluator = 'tests.objectives.toy:Accuracy'
    targets = 'sequences'
    metrics = ('accuracy',)

    def resolve_data(self, config):
        return data_config.resolve(config, objective='mlm')

    def tokenizer(self, config):
        class Numbers:
            vocab_size, fingerprint = NUMBERS, 'numbers'

        return Numbers()

    def identity(self, config):
        return {'numbers': 'drawn'}

    def check_split(self, config, split):
        if split not in ('train', 'valid'):
            raise UserError(f'numbers have no split "{split}"')

    def places_per_epoch(self, config, tokenizer):
        return 2**16

    def train_batches(self, config, *, tokenizer, seed, rows=None):
        return Drawn(config, seed, rows)

    def eval_batches(self, config, *, tokenizer, split, context, batch_size, max_tokens):
        for number in range(4):
            yield draw(np.random.default_rng([1, number]), batch_size, context)

    def arrays(self, config, *, rows, context):
        return {
            'inputs': ((rows, context), np.int32),
            'labels': ((rows,), np.int32),
            'weights': ((rows,), np.float32),
        }

    def build(self, config, *, data, tokenizer, target):
        return Classifier(registry.build(config, vocab_size=tokenizer.vocab_size, causal=False, target=target))

    def init(self, model, key, *, context):
        return model.init(key, jnp.zeros((1, context), jnp.int32))['params']

    def flops_per_token(self, config, *, context, tokenizer):
        return 1.0

    def loss(self, model, params, batch: Mapping, *, dropout_key=None):
        logits_B2 = model.apply({'params': params}, batch['inputs'])
        nll_B = optax.softmax_cross_entropy_with_integer_labels(logits_B2, batch['labels'])
        right_B = jnp.argmax(logits_B2, axis=-1) == batch['labels']
        return (nll_B * batch['weights']).sum(), {'accuracy': (right_B * batch['weights']).sum()}


class Accuracy(BatchEvaluator):
    """How many labels are right."""

    headline = ('accuracy',)

    def outputs(self, params, batch):
        return jnp.argmax(self.run.model.apply({'params': params}, batch['inputs']), axis=-1)

    def measure(self, params, case, *, cancelled=lambda: False):
        right = rows = 0
        for batch, answers_B in self.batches(params, case, cancelled):
            right, rows = right + int((answers_B == batch['labels']).sum()), rows + len(answers_B)
        yield 'accuracy', right / rows
        yield 'sequences', rows


def draw(rng, rows, context):
    labels = rng.integers(0, 2, rows)
    low = rng.integers(0, NUMBERS // 2, (rows, context))
    upper = rng.random((rows, context)) < np.where(labels, 0.7, 0.3)[:, None]
    inputs = low + upper * (NUMBERS // 2)
    return {
        'inputs': inputs.astype(np.int32),
        'labels': labels.astype(np.int32),
        'weights': np.ones(rows, np.float32),
    }


class Drawn:
    """Batch after batch, each drawn from the seed and its number."""

    def __init__(self, config, seed, rows):
        self._config, self._seed, self._number = config, seed, 0
        self.batch_size = config.batch_size
        self.rows = tuple(range(config.batch_size) if rows is None else rows)
        self.rows_read = len(self.rows)

    def __next__(self):
        rng = np.random.default_rng([0, self._seed, self._number])
        self._number += 1
        batch = draw(rng, self.batch_size, self._config.context)
        return jax.tree.map(lambda x: x[list(self.rows)], batch)

    def get_state(self):
        return {'0': self._number}

    def set_state(self, state):
        self._number = state['0']

    def close(self):
        pass
