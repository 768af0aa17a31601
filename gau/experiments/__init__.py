"""Experiments as programs: sweeps of runs, and tables with error bars made of their work directories."""
