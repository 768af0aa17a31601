"""From a config to a trained checkpoint: loop, optimizer, checkpoints, metrics, meshes and evaluation."""
