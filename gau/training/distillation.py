"""Training against the predictions of a larger model as well: `config.distillation`."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from gau.errors import UserError
from gau.layers.sharding import devices_together
from gau.models import config as model_config
from gau.models.language_model import output_matrix
from gau.models.target import Target
from gau.ops.distillation import sliced_divergence
from gau.training import workdir as files
from gau.training.checkpoints import Checkpoints
from gau.training.wrapped import Wrapped

if TYPE_CHECKING:
    from gau.training.setup import Run


@dataclass(frozen=True)
class Distilled(Wrapped):
    """The loss of a student: that of its objective, and how far its predictions are from the teacher's.

    Attributes:
      objective: of both.
      teacher: its model.
      teacher_params: its parameters.
      weight: a of the loss (1 - a) loss + a T^2 KL(teacher || student).
      temperature: T.
    """

    teacher: Any
    teacher_params: Any
    weight: float
    temperature: float

    def loss(self, model: Any, params: Any, batch: Mapping[str, Any], *, dropout_key: Any = None) -> tuple[Any, dict]:
        """See `Objective.loss`; the teacher has no dropout."""
        tokens = {'segment_ids_BN': batch.get('segment_ids'), 'positions_BN': batch.get('positions')}
        hidden_BND = model.apply(
            {'params': params},
            batch['inputs'],
            **tokens,
            deterministic=dropout_key is None,
            rngs=None if dropout_key is None else {'dropout': dropout_key},
            method='hidden',
        )
        teacher_BND = self.teacher.apply({'params': self.teacher_params}, batch['inputs'], **tokens, method='hidden')
        kl_BN = sliced_divergence(
            *(hidden_BND, output_matrix(params)),
            *(teacher_BND, output_matrix(self.teacher_params)),
            temperature=self.temperature,
            positions_per_slice=model.config.vocab_loss_slice,
            devices=devices_together(),
        )
        losses_BN = self.weight * self.temperature**2 * kl_BN
        if self.weight < 1:
            nll_BN = model.apply({'params': params}, hidden_BND, batch['targets'], method='losses')
            losses_BN += (1 - self.weight) * nll_BN
        # What stands at padding, whatever it is, counts for nothing.
        return jnp.sum(jnp.where(batch['weights'] != 0, losses_BN * batch['weights'], 0)), {}


def teacher_of(run: 'Run') -> tuple[Any, Any]:
    """Returns the model of `config.distillation.teacher` and its parameters, laid over the mesh of the run.

    Raises:
      UserError: it is no work directory or checkpoint, or was trained for another objective or tokenizer.
    """
    from gau.training.load import check_tokenizer

    source = Path(run.config.distillation.teacher)
    where = f'distillation.teacher={source}'
    workdir, step = files.checkpoint_of(source)
    if not (workdir / files.CONFIG).is_file():
        raise UserError(f'{where} is neither a work directory nor a checkpoint in one')
    trained = files.read_config(workdir)
    if trained.objective != run.config.objective:
        raise UserError(
            f'{where} was trained for the objective {trained.objective}, this run for {run.config.objective}'
        )
    config = run.config.copy_and_resolve_references()
    trained.model.impl = 'auto'
    config.model = model_config.resolve(trained.model, causal=run.objective.causal, context=config.data.context)
    target = Target.of_device(run.mesh.devices.flat[0], sequence_shards=run.mesh.shape['sequence'])
    model = run.objective.build(config.model, data=config.data, tokenizer=run.tokenizer, target=target)
    teacher = replace(run, config=config, model=model)
    saved = Checkpoints(workdir)
    try:
        chosen = saved.chosen(step, where=where)
        check_tokenizer(run.tokenizer, trained.data.tokenizer, saved.meta(chosen).get('data', {}).get('tokenizer'))
        return model, saved.restore_params(teacher.abstract_params, step=chosen)
    finally:
        saved.close()
