from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec
from ml_collections import ConfigDict

from gau.errors import UserError
from gau.training import mesh as meshes
from gau.training import start


def test_names_become_mesh_axes():
    assert meshes.partition_spec(('embed', 'expanded')) == PartitionSpec('fsdp', 'tensor')
    assert meshes.partition_spec(('batch', 'length', None)) == PartitionSpec(('data', 'fsdp'), 'sequence', None)


def test_unknown_name_and_axis_used_twice_are_errors():
    with pytest.raises(UserError, match=r'"embd".*did you mean "embed"'):
        meshes.partition_spec(('embd',))
    with pytest.raises(UserError, match='twice'):
        meshes.partition_spec(('vocab', 'expanded'))


def test_every_rule_names_mesh_axes():
    for name, _ in meshes.AXIS_RULES:
        for axis in jax.tree.leaves(tuple(meshes.partition_spec((name,)))):
            assert axis in meshes.MESH_AXES


def test_sizes_must_multiply_to_the_devices():
    mesh = meshes.make_mesh(ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}))
    assert mesh.size == jax.device_count()
    with pytest.raises(UserError, match='must multiply'):
        meshes.make_mesh(ConfigDict({'data': 3, 'fsdp': 5, 'tensor': 1, 'sequence': 1}))
    with pytest.raises(UserError, match='at most one'):
        meshes.make_mesh(ConfigDict({'data': -1, 'fsdp': -1, 'tensor': 1, 'sequence': 1}))


@pytest.mark.parametrize(('used', 'said'), [
    (8, []),
    (3, ['the mesh uses 3 of 8 devices; --config.mesh.data=-1 asks for all of them']),
])  # fmt: skip
def test_a_run_says_which_devices_it_leaves(monkeypatch, used, said):
    monkeypatch.setattr(jax, 'device_count', lambda: 8)
    config = ConfigDict({'checkpoint': {'keep_every': 0}})
    run = SimpleNamespace(mesh=SimpleNamespace(size=used), config=config)
    assert list(start.hints(run, SimpleNamespace(rows=[0], rows_read=1))) == said


def test_shardings_follow_the_boxes():
    mesh = meshes.make_mesh(ConfigDict({'data': -1, 'fsdp': 1, 'tensor': 1, 'sequence': 1}))
    tree = {'kernel': nn.LogicallyPartitioned(jnp.ones((4, 6)), ('embed', 'expanded')), 'count': jnp.zeros(())}
    found = meshes.shardings(tree, mesh)
    assert found['kernel'].spec == PartitionSpec('fsdp', 'tensor')
    assert found['count'].spec == PartitionSpec()


def test_a_shard_of_a_text_is_whole_chunks():
    mesh = SimpleNamespace(shape={'data': 2, 'fsdp': 2, 'tensor': 1, 'sequence': 4})
    flash = ConfigDict({'name': 'flash', 'chunk_size': 32})
    meshes.check_batch(mesh, batch_size=8, context=256, model=flash)
    with pytest.raises(UserError, match=r'data.context=192 over mesh.sequence=4 is 48 tokens'):
        meshes.check_batch(mesh, batch_size=8, context=192, model=flash)
    meshes.check_batch(mesh, batch_size=8, context=192, model=ConfigDict({'name': 'flash_quad', 'chunk_size': None}))
    with pytest.raises(UserError, match=r'does not divide over mesh.sequence=4'):
        meshes.check_batch(mesh, batch_size=8, context=254, model=flash)
    with pytest.raises(UserError, match=r'data x fsdp = 4; --config.mesh.data=3 --config.mesh.fsdp=1 fits'):
        meshes.check_batch(mesh, batch_size=6, context=256, model=flash)
