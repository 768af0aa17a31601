"""The first oracle: NumPy in float64, one token at a time, written from the formulas and without a look at the ops.

GAU and mixed chunk attention are the code that docs/paper.md section 9 prints, executed from there; here are the other
attention functions and the baselines. One sequence [N, ...] at a time; segment ids are a list of N integers, 0 for
padding.
"""

import functools
import math
import re
from pathlib import Path

import numpy as np

PAPER = Path(__file__).resolve().parents[2] / 'docs' / 'paper.md'


def _code_of_the_paper():
    """What the fenced blocks of Python in docs/paper.md define."""
    names = {'np': np, 'math': math}
    for block in re.findall(r'^```python\n(.*?)^```$', PAPER.read_text(), re.MULTILINE | re.DOTALL):
        exec(block, names)
    return names


_paper = _code_of_the_paper()
FUNCTIONS, sees, silu, rope = (_paper[name] for name in ('FUNCTIONS', 'sees', 'silu', 'rope'))
quadratic, mixed_chunk, toeplitz, rotary = (_paper[name] for name in ('quadratic', 'mixed_chunk', 'toeplitz', 'rotary'))


def smooth_relu2(x, epsilon=0.05):
    if x < -epsilon:
        return 0.0
    return x**2 if x > epsilon else ((x + epsilon) ** 2 / (4 * epsilon)) ** 2


FUNCTIONS.update(
    laplace=lambda x: 0.5 * (1 + math.erf((x - math.sqrt(0.5)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2)))),
    softplus2=lambda x: math.log1p(math.exp(x)) ** 2,
    smooth_relu2=smooth_relu2,
)


def linear(phi_q, phi_k, v, *, causal, ids=None):
    """Performer's quotient."""
    n = len(v)
    ids = [1] * n if ids is None else ids
    out = np.zeros_like(v)
    for t in range(n):
        visible = [s for s in range(n) if sees(ids, t, s, causal)]
        if visible:
            out[t] = sum((phi_q[t] @ phi_k[s]) * v[s] for s in visible) / sum(phi_q[t] @ phi_k[s] for s in visible)
    return out


def linformer(q, k, v, e, f, *, ids=None):
    """softmax(q (E k)^T / sqrt(K)) (F v) with e and f [N, R], each document projected for itself."""
    n = len(v)
    ids = [1] * n if ids is None else ids
    out = np.zeros_like(v)
    for t in range(n):
        document = [s for s in range(n) if sees(ids, t, s, False)]
        if document:
            slots_k = sum(np.outer(e[s], k[s]) for s in document)
            slots_v = sum(np.outer(f[s], v[s]) for s in document)
            weights = np.exp(slots_k @ q[t] / math.sqrt(len(q[t])))
            out[t] = weights / weights.sum() @ slots_v
    return out


def combiner(q, k, v, *, row, causal, ids=None):
    """Row-major axial Combiner as a probability over single tokens."""
    n, scale = len(v), 1 / math.sqrt(q.shape[1])
    ids = [1] * n if ids is None else ids
    out = np.zeros_like(v)
    for t in range(n):
        visible = [s for s in range(n) if sees(ids, t, s, causal)]
        terms = [(math.exp(q[t] @ k[s] * scale), v[s]) for s in visible if s // row == t // row]
        for column in range(row):
            members = [s for s in visible if s % row == column and s // row != t // row]
            if members:
                mean_q, mean_k = q[members].mean(0), k[members].mean(0)
                inner = np.exp(k[members] @ mean_q * scale)
                terms.append((math.exp(q[t] @ mean_k * scale), inner / inner.sum() @ v[members]))
        if terms:
            out[t] = sum(w * x for w, x in terms) / sum(w for w, _ in terms)
    return out


def gau(params, x, *, causal, positions, chunk=None, **options):
    """The unit of docs/paper.md section 1, or 3 with `chunk`."""
    if chunk:
        options['chunk'] = chunk
    attend = functools.partial(mixed_chunk if chunk else quadratic, causal=causal, **options)
    return _paper['gau'](params, x, attend, positions=positions, chunk=chunk)
