"""The paper's experiments, a config program each: `python scripts/reproduce.py NAME` makes its table."""
