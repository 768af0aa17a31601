"""GAU and FLASH (Hua et al. 2022) in JAX and Flax: layers, models, data and training.

    run, params, step = gau.load_run('runs/first')

opens a trained model (`gau.training.load.load_run`). `import gau` alone imports nothing else, JAX included.
"""

__version__ = '0.1.0'
__all__ = ['load_run']


def __getattr__(name: str):
    # Imported when first asked for: it brings JAX, Orbax and Grain, which take seconds.
    if name == 'load_run':
        from gau.training.load import load_run

        return load_run
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
