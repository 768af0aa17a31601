"""GAU and FLASH (Hua et al. 2022) in JAX and Flax: layers, models, data and training."""

__version__ = '0.1.0'
