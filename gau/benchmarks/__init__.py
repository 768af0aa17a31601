"""Measurements of speed and memory (scripts/benchmark.py), and what the compiler says of them (compile_check)."""
