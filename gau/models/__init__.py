"""Models: a list of blocks named by the config, between a tied embedding and its head.

`config` (fields, defaults, refusals) and `architectures` (the tables) import no JAX; `registry.build` makes the module.
"""
