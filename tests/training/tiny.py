"""A run of seconds, for tests: two narrow FLASH layers on the embedded corpus."""

from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from configs import common
from gau.training import config as training_config
from gau.training import workdir
from gau.training.checkpoints import Checkpoints
from gau.training.setup import Run
from gau.training.step import TrainState

# How fast a machine was is not what a run computes.
TIMINGS = ('tokens_per_second', 'step_seconds', 'mfu')


def tiny_config(**overrides) -> ConfigDict:
    """Returns a runnable config; overrides are written `model__num_layers=3` for `config.model.num_layers`."""
    config = common.run_local(training_config.default_config())
    config.model.num_layers = 2
    config.model.model_dim = 32
    config.model.query_key_dim = 16
    config.model.chunk_size = 16
    config.data.context = 48
    config.data.batch_size = 2
    config.steps = 6
    config.checkpoint.every_steps = 2
    config.eval.every_steps = 4
    config.eval.max_tokens = 500
    config.log.every_steps = 1
    config.optimizer.schedule = 'constant'  # so that runs of different length begin alike
    for path, value in overrides.items():
        *sections, field = path.split('__')
        section = config
        for name in sections:
            section = section[name]
        section[field] = value
    return config


def read_metrics(path: Path) -> list[dict]:
    """Returns the lines of a run's metrics.jsonl without timings."""
    rows = workdir.read_metrics(Path(path) / 'metrics.jsonl')
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def read_state(path: Path, *, step: int | None = None) -> TrainState:
    """Returns the state in a work directory's checkpoint, whatever the mesh was."""
    config = workdir.read_config(path)
    config.mesh = ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1})
    run = Run.from_config(config)
    saved = Checkpoints(path)
    try:
        return saved.restore(run.abstract_state, step=step)
    finally:
        saved.close()


def assert_trees_equal(a, b) -> None:
    """Asserts that two trees agree to the last bit."""
    import jax

    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert np.array_equal(np.asarray(x), np.asarray(y)), jax.tree_util.keystr(path)
