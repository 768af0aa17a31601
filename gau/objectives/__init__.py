"""Objectives: what a model is trained for. What a batch holds, the model's head, the loss and the metrics.

A file each: `gau/objectives/NAME.py` holds the objective of `config.objective = 'name'`; one of your own is written
`module:Class` (`gau.objectives.objective`).
"""
