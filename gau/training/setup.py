"""Everything a run is made of, built once from its config; training, evaluation and the scripts all start here."""

import dataclasses
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from clu import parameter_overview
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from gau import lookup, outputs
from gau.data.passes import Passes
from gau.errors import UserError, warn
from gau.evaluation.evaluator import Evaluator
from gau.models.target import Target
from gau.objectives import objective as objectives
from gau.objectives.objective import Objective
from gau.training import checkpoints, durations, recurrent, step
from gau.training import config as training_config
from gau.training import distillation as distilling
from gau.training import mesh as meshes
from gau.training.batches import of_rank, put_batch
from gau.training.optimizer import frozen_parameters, make_optimizer, make_schedule
from gau.training.quantization import quantised
from gau.training.throughput import training_mfu
from gau.training.traced import activations

CACHE_VARIABLE = 'GAU_COMPILATION_CACHE'


def use_compilation_cache() -> None:
    """Keeps compiled programs in ~/.cache/gau/xla, or where GAU_COMPILATION_CACHE says ("" for nowhere).

    JAX_COMPILATION_CACHE_DIR, if set, is left to JAX. Where nothing can be written nothing is kept, which is said once;
    JAX would say it of every program.
    """
    if 'JAX_COMPILATION_CACHE_DIR' in os.environ:
        return
    directory = os.environ.get(CACHE_VARIABLE, str(Path.home() / '.cache' / 'gau' / 'xla'))
    # (JAX knows directories elsewhere, such as gs://...)
    if directory and '://' not in directory:
        try:
            outputs.check_writable_directory(Path(directory))
        except OSError as error:
            warn(f'{directory} cannot be written ({error.strerror}): compiled programs are not kept')
            return
    if directory:
        jax.config.update('jax_compilation_cache_dir', directory)


@dataclasses.dataclass(frozen=True)
class Run:
    """A resolved config with what it names; the costly parts are built when first asked for."""

    config: ConfigDict
    objective: Objective
    tokenizer: Any
    mesh: Mesh
    model: nn.Module

    @classmethod
    def from_config(cls, config: ConfigDict, *, devices: list[jax.Device] | None = None) -> 'Run':
        """Builds the parts of a resolved config, on all devices or on those given.

        Raises:
          UserError: the tokenizer is missing, the mesh does not fit the devices, or `model.impl` does not run on them.
        """
        objective = objectives.load(config.objective)
        tokenizer = objective.tokenizer(config.data)
        mesh = meshes.make_mesh(config.mesh, devices)
        if config.model.dtype == 'float64' and not jax.config.jax_enable_x64:
            raise UserError('model.dtype=float64 needs JAX_ENABLE_X64=1 in the environment')
        target = Target.of_device(mesh.devices.flat[0], sequence_shards=mesh.shape['sequence'])
        model = objective.build(config.model, data=config.data, tokenizer=tokenizer, target=target)
        if config.quantization != 'none':
            model = quantised(model, config.quantization)
        return cls(config, objective, tokenizer, mesh, model)

    def check(self) -> None:
        """Finds what would go wrong in training only later.

        Raises:
          UserError: the batch does not divide over the mesh, the schedule is impossible, or what an evaluator or the
            teacher says.
        """
        self.check_batch(self.config.data.batch_size // self.config.optimizer.accumulation_steps)
        for evaluator in self.evaluators():
            evaluator.check()
        _ = self.abstract_state
        if self.config.distillation.teacher is not None:
            _ = self._teacher

    def check_batch(self, rows: int, context: int | None = None) -> None:
        """Raises UserError unless [rows, context] arrays divide over the mesh; None means the config's context."""
        context = context or self.config.data.context
        meshes.check_batch(self.mesh, batch_size=rows, context=context, model=self.config.model)

    def put_batch(self, batch: dict[str, Any]) -> dict[str, jax.Array]:
        """Makes global arrays of a whole batch, which every process has."""
        return put_batch(batch, meshes.batch_sharding(self.mesh))

    @property
    def devices(self) -> str:
        """What the run computes on, e.g. `8 x NVIDIA H100`."""
        return f'{self.mesh.size} x {self.mesh.devices.flat[0].device_kind}'

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation of training at this speed; None where the chip is unknown."""
        return training_mfu(
            flops_per_token=self.flops_per_token, tokens_per_second=tokens_per_second, devices=self.mesh.size
        )

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one global batch."""
        return self.config.data.batch_size * self.config.data.context

    @cached_property
    def data_identity(self) -> dict[str, str]:
        """What tells whether the data or the tokenizer changed, by source."""
        return {**self.objective.identity(self.config.data), 'tokenizer': self.tokenizer.fingerprint}

    @cached_property
    def _tokens_per_epoch(self) -> int:
        return self.objective.places_per_epoch(self.config.data, self.tokenizer)

    def passes(self, steps: int) -> dict[str, Passes]:
        """Returns how often so many steps pass over each source whose size is known without reading it."""
        return self.objective.passes(self.config.data, steps * self.tokens_per_step)

    def steps(self, section: str = '', stem: str = '') -> int:
        """Returns a duration of the config in steps: the run's own, or e.g. `steps('optimizer', 'warmup_')`."""
        return self._in_steps(self.config[section] if section else self.config, stem, section)

    @property
    def save_every(self) -> int:
        """How many steps lie between two checkpoints."""
        return max(self.steps('checkpoint', 'every_'), 1)

    def evaluated_every(self, evaluator: Evaluator) -> int:
        """Returns how many steps lie between two of its evaluations."""
        return max(self._in_steps(evaluator.entry, 'every_', f'evaluators.{evaluator.name}'), 1)

    def _in_steps(self, section: ConfigDict, stem: str, path: str) -> int:
        return durations.in_steps(
            section,
            stem,
            where=f'{path}.' if path else '',
            tokens_per_step=self.tokens_per_step,
            tokens_per_epoch=lambda: self._tokens_per_epoch,
            total_steps=self.total_steps if path else None,
        )

    @cached_property
    def total_steps(self) -> int:
        """Length of the run in steps."""
        return max(self.steps(), 1)

    @cached_property
    def schedule(self) -> optax.Schedule:
        """Learning rate by step."""
        return make_schedule(
            self.config.optimizer,
            warmup_steps=self.steps('optimizer', 'warmup_'),
            total_steps=self.total_steps,
            last_decay_steps=self.total_steps - self.stable_until,
        )

    @cached_property
    def stable_until(self) -> int:
        """The step where the decay of the schedule `wsd` begins, from which runs are forked; else the end."""
        decays = self.config.optimizer.schedule == 'wsd'
        return self.total_steps - (self.steps('optimizer', 'decay_') if decays else 0)

    def same_rates_until(self, other: 'Run') -> int:
        """Returns after how many steps the learning rate of two runs differs for the first time, up to the shorter."""
        steps = min(self.total_steps, other.total_steps)
        rates, others = (np.asarray(jax.vmap(run.schedule)(np.arange(steps))) for run in (self, other))
        different = np.flatnonzero(np.broadcast_to(rates != others, (steps,)))
        return int(different[0]) if different.size else steps

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """Clipping, the optimizer and its schedule."""
        params = nn.unbox(self._boxed_params)
        return make_optimizer(self.config.optimizer, self.schedule, params, dtype=self.config.model.dtype)

    @cached_property
    def _draw_params(self) -> Callable[[jax.Array | int], Any]:
        # Traced once within `_drawing`, wherever it is called. The seed is an argument and no constant of the program:
        # all seeds of a sweep then find one compiled program in the cache.
        context = self.config.data.context
        return jax.jit(lambda seed: self.objective.init(self.model, jax.random.key(seed), context=context))

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Context to draw parameters in, or to ask for their shapes; it changes a setting of JAX while it is open."""
        setting, before = 'jax_threefry_gpu_kernel_lowering', jax.config.jax_threefry_gpu_kernel_lowering
        # One GPU draws the same bits with a kernel of jaxlib, or XLA would compile a program for each of the draws, in
        # most of the time to the first step. Over several devices XLA would have each draw all bits of a parameter.
        jax.config.update(setting, before or self.mesh.size == 1)
        try:
            with self.context():
                yield
        finally:
            jax.config.update(setting, before)

    @cached_property
    def _boxed_params(self) -> Any:
        with self._drawing():
            return jax.eval_shape(self._draw_params, self.config.seed)

    @cached_property
    def abstract_params(self) -> Any:
        """Tree of jax.ShapeDtypeStruct with shardings."""
        return checkpoints.abstract(nn.unbox(self._boxed_params), meshes.shardings(self._boxed_params, self.mesh))

    @cached_property
    def _init(self) -> Callable[[jax.Array | int], step.TrainState]:
        return step.make_init(self._draw_params, self.optimizer)

    @cached_property
    def _teacher(self) -> tuple[nn.Module, Any]:
        return distilling.teacher_of(self)

    @cached_property
    def abstract_state(self) -> step.TrainState:
        """The TrainState as jax.ShapeDtypeStruct with shardings: what restoring needs, and compiling ahead of time."""
        # The optimizer is made outside, where there is no mesh yet to lay shapes over.
        init = self._init
        with self._drawing():
            boxed = jax.eval_shape(init, self.config.seed)
        shardings = meshes.shardings(boxed, self.mesh)
        if self._over_data:
            opt_state = jax.tree.map(
                lambda leaf, sharding: meshes.over_data(leaf.shape, sharding),
                *(nn.unbox(boxed.opt_state), shardings.opt_state),
            )
            shardings = shardings.replace(opt_state=opt_state)
        return checkpoints.abstract(nn.unbox(boxed), shardings)

    @property
    def _over_data(self) -> bool:
        return self.config.optimizer.sharding == 'data' and self.mesh.shape['data'] > 1

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and shardings of a training batch."""
        data, sharding = self.config.data, meshes.batch_sharding(self.mesh)
        arrays = self.objective.arrays(data, rows=data.batch_size, context=data.context)
        return {
            name: jax.ShapeDtypeStruct(shape, dtype, sharding=of_rank(sharding, len(shape)))
            for name, (shape, dtype) in arrays.items()
        }

    def init_params(self) -> Any:
        """Draws the parameters of step 0 alone, every leaf on its own devices at once."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_params)
        with self._drawing():
            return jax.jit(lambda seed: nn.unbox(self._draw_params(seed)), out_shardings=shardings)(self.config.seed)

    def init_state(self) -> step.TrainState:
        """Draws the state of step 0, every leaf on its own devices at once."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        with self._drawing():
            return jax.jit(lambda seed: nn.unbox(self._init(seed)), out_shardings=shardings)(self.config.seed)

    def train_step(self) -> Callable[[step.TrainState, step.Batch], tuple[step.TrainState, dict[str, jax.Array]]]:
        """Returns the jitted step; the state given to it is consumed."""
        optimizer, distillation = self.config.optimizer, self.config.distillation
        frozen = frozen_parameters(optimizer, self.abstract_params) if optimizer.frozen else None

        def make(objective: Any) -> Callable[[step.TrainState, step.Batch], Any]:
            return step.make_train_step(
                objective,
                self.model,
                self.optimizer,
                self.schedule,
                seed=self.config.seed,
                accumulation_steps=optimizer.accumulation_steps,
                dropout=self.config.model.dropout_rate > 0,
                update_shardings=self._update_shardings,
                frozen=frozen,
            )

        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)
        # The metrics are whole everywhere, because every process reads them.
        outputs = shardings, NamedSharding(self.mesh, PartitionSpec())
        options = dict(self.model.implementation.compiler_options)
        if distillation.teacher is None:
            segment = optimizer.segment_tokens
            objective = self.objective if segment is None else recurrent.Recurrent(self.objective, segment)
            return jax.jit(make(objective), donate_argnums=0, out_shardings=outputs, compiler_options=options)
        teacher, teacher_params = self._teacher

        def train_step(state: step.TrainState, batch: step.Batch, teacher_params: Any) -> Any:
            weights = distillation.weight, distillation.temperature
            return make(distilling.Distilled(self.objective, teacher, teacher_params, *weights))(state, batch)

        jitted = jax.jit(train_step, donate_argnums=0, out_shardings=outputs, compiler_options=options)
        # An argument, not a constant of the program.
        return lambda state, batch: jitted(state, batch, teacher_params)

    @property
    def _update_shardings(self) -> Any:
        if not self._over_data:
            return None
        return jax.tree.map(lambda leaf: meshes.over_data(leaf.shape, leaf.sharding), self.abstract_params)

    def evaluators(self) -> list[Evaluator]:
        """Returns the evaluators of the config's entries.

        Raises:
          UserError: a type that cannot be imported, or what an evaluator says of its entry and this run.
        """
        return [
            lookup.find(f'evaluators.{name}.type', entry.type, 'evaluation')(self, name, entry)
            for name, entry in training_config.evaluators(self.config).items()
        ]

    def context(self) -> 'MeshContext':
        """Context in which the run's functions are traced and called: the mesh and the logical axis rules."""
        return MeshContext(self.mesh)

    @cached_property
    def flops_per_token(self) -> float:
        """Of one forward pass at the config's context, by our own closed form."""
        return self.objective.flops_per_token(
            self.config.model, context=self.config.data.context, tokenizer=self.tokenizer
        )

    def parameter_table(self, params: Any) -> str:
        """Returns name, shape, dtype, sharding and count of every parameter as text."""
        return parameter_overview.get_parameter_overview(params, include_stats='sharding') + '\n'

    def sharding_table(self) -> str:
        """Returns how every parameter and the main activations lie on the devices, as text; compiles nothing."""
        params = self.abstract_params
        with self.context():
            traced = jax.jit(partial(self.objective.loss, self.model)).trace(params, self.abstract_batch)
        return f'{self.parameter_table(params)}\n{activations(traced.jaxpr, self.mesh)}\n'


class MeshContext:
    """`with` this, arrays with logical axis names are laid over `mesh`."""

    def __init__(self, mesh: Mesh):
        self._contexts = (lambda: jax.set_mesh(mesh), lambda: nn.logical_axis_rules(meshes.AXIS_RULES))
        self._open: list[Any] = []

    def __enter__(self) -> None:
        for make in self._contexts:
            context = make()
            context.__enter__()
            self._open.append(context)

    def __exit__(self, *exception: Any) -> None:
        while self._open:
            self._open.pop().__exit__(*exception)
