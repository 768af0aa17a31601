"""Evaluators: what a run measures besides the loss of its training batches, in training and by `eval.py` alike.

A file each: `gau/evaluation/NAME.py` holds the evaluator of `type='name'`, see `gau.evaluation.evaluator`.
"""
