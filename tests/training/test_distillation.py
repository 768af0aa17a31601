"""Distillation: the divergence is what the formula says, a student equal to its teacher has none, runs resume."""

import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gau.errors import UserError
from gau.ops.distillation import sliced_divergence
from gau.training import loop
from gau.training.distillation import Distilled
from gau.training.setup import Run
from tests.numerics import float64, max_error, normal
from tests.training.tiny import assert_trees_equal, read_metrics, read_state, tiny_config


def test_the_divergence_and_its_gradient_are_those_of_the_formula():
    with float64():
        hidden, teacher = normal(0, 2, 7, 4), normal(1, 2, 7, 6)
        embedding, teacher_embedding, weights = normal(2, 11, 4), normal(3, 11, 6), normal(4, 2, 7)

        def formula(hidden, embedding):
            p, q = (
                jax.nn.softmax(h @ e.T / 3, axis=-1) for h, e in ((teacher, teacher_embedding), (hidden, embedding))
            )
            return (weights * (p * jnp.log(p / q)).sum(axis=-1)).sum()

        def sliced(hidden, embedding, size):
            kl_BN = sliced_divergence(
                *(hidden, embedding, teacher, teacher_embedding), temperature=3.0, positions_per_slice=size
            )
            assert kl_BN.shape == (2, 7)
            return (weights * kl_BN).sum()

        expected = jax.value_and_grad(formula, (0, 1))(hidden, embedding)
        for size in (3, 100):
            found = jax.value_and_grad(functools.partial(sliced, size=size), (0, 1))(hidden, embedding)
            assert max_error(found, expected) < 1e-12


@pytest.fixture(scope='module')
def teacher(tiny_run):
    return tiny_run


def config(teacher, **fields):
    """Of a student that is narrower than its teacher."""
    fields = {'model__num_layers': 1, 'model__query_key_dim': 8, **fields}
    return tiny_config(distillation__teacher=str(teacher), distillation__weight=0.7, **fields)


@pytest.mark.slow
def test_a_student_that_is_its_teacher_has_no_loss_of_its_own(teacher):
    run = Run.from_config(loop.resolve(tiny_config(model__num_layers=1)))
    params = read_state(teacher).params
    batch = next(run.objective.train_batches(run.config.data, tokenizer=run.tokenizer, seed=0))
    distilled = Distilled(run.objective, run.model, params, 1.0, 2.0)
    loss, gradient = jax.jit(jax.value_and_grad(lambda params: distilled.loss(run.model, params, batch)[0]))(params)
    assert abs(loss) < 1e-3
    assert max(np.abs(x).max() for x in jax.tree.leaves(gradient)) < 1e-4
    # Of the mixture there is the plain loss left, by its weight.
    mixture = Distilled(run.objective, run.model, params, 0.25, 2.0)
    mixed, plain = jax.jit(
        lambda params: (
            mixture.loss(run.model, params, batch)[0],
            run.objective.loss(run.model, params, batch)[0],
        )
    )(params)
    assert float(mixed) == pytest.approx(0.75 * float(plain), rel=1e-5)


# The teacher is no part of what is saved: a run is resumed as any other (test_loop.py).
@pytest.mark.slow
def test_a_distilled_run_resumes_bitwise(teacher, tmp_path):
    loop.train(config(teacher), tmp_path / 'run')
    plain = loop.train(tiny_config(model__num_layers=1, model__query_key_dim=8), tmp_path / 'plain')
    assert plain['train']['loss'] != read_metrics(tmp_path / 'run')[-2]['loss']
    path = shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
    shutil.rmtree(path / 'checkpoints' / '6')
    (path / 'final.json').unlink()
    # The teacher may have moved.
    loop.train(config(shutil.copytree(teacher, tmp_path / 'moved')), path)
    assert_trees_equal(read_state(path), read_state(tmp_path / 'run'))


def test_what_does_not_fit_is_refused_before_anything_is_written(teacher, tmp_path):
    for fields, message in (
        ({'distillation__weight': 0.0}, 'must lie in 0..1, above 0'),
        ({'distillation__temperature': -1.0}, 'must be positive and finite'),
        ({'distillation__teacher': None}, 'do nothing without distillation.teacher'),
        ({'distillation__teacher': str(tmp_path)}, 'is neither a work directory nor a checkpoint in one'),
        ({'distillation__teacher': str(teacher / 'checkpoints/3')}, r'no such checkpoint, .* has \[2, 4, 6\]'),
        ({'objective': 'mlm'}, 'was trained for the objective lm, this run for mlm'),
        ({'objective': 'tests.objectives.toy:Halves'}, 'is for the objectives lm and mlm'),
    ):
        changed = config(teacher)
        for path, value in fields.items():
            *sections, field = path.split('__')
            section = changed
            for name in sections:
                section = section[name]
            section[field] = value
        with pytest.raises(UserError, match=message):
            loop.train(changed, tmp_path / 'run')
    assert not (tmp_path / 'run').exists()
