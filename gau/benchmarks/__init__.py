"""Measurements of speed and memory: each kind yields rows (dicts); scripts/benchmark.py shows them."""
