"""Faster implementations of what `gau.ops` defines, each tested against its reference for values and all gradients."""
