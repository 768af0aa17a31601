"""Models: a list of blocks named by the config, between an embedding and an output layer.

`config` (fields, defaults, refusals) and `architectures` (the tables) import no JAX; `registry.build` makes the module.
"""
