"""The first oracle: the paper's formulas (docs/paper.md sections 1 to 4) in NumPy float64, one token at a time.

Written from the formulas, with loops and without a look at the ops. One sequence [N, ...] at a time; segment ids are a
list of N integers, 0 for padding.
"""

import math

import numpy as np


def silu(x):
    return x / (1 + np.exp(-x))


def rope(x, position):
    """Turns the pairs (x[i], x[i + S/2]) of one vector by position * 10000^(-i / (S/2))."""
    half = len(x) // 2
    y = np.empty_like(x)
    for i in range(half):
        angle = position * 10000.0 ** (-i / half)
        y[i] = x[i] * math.cos(angle) - x[half + i] * math.sin(angle)
        y[half + i] = x[half + i] * math.cos(angle) + x[i] * math.sin(angle)
    return y


def smooth_relu2(x, epsilon=0.05):
    if x < -epsilon:
        return 0.0
    return x**2 if x > epsilon else ((x + epsilon) ** 2 / (4 * epsilon)) ** 2


FUNCTIONS = {
    'relu2': lambda x: max(x, 0.0) ** 2,
    'laplace': lambda x: 0.5 * (1 + math.erf((x - math.sqrt(0.5)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2)))),
    'softplus2': lambda x: math.log1p(math.exp(x)) ** 2,
    'smooth_relu2': smooth_relu2,
}


def sees(ids, t, s, causal):
    """Whether token t sees token s."""
    return ids[t] > 0 and ids[t] == ids[s] and (s <= t or not causal)


def weight_row(scores, dim, *, function, normalizer, paper_length, fixed_length, biases):
    """Attention weights of one query from the raw q.k of the keys it sees."""
    if function == 'softmax':
        scaled = [math.exp(score / math.sqrt(dim) + b) for score, b in zip(scores, biases, strict=True)]
        return [x / sum(scaled) for x in scaled]
    f = FUNCTIONS[function]
    if normalizer == 'su':
        return [f(score / math.sqrt(dim) + b) / len(scores) for score, b in zip(scores, biases, strict=True)]
    n = {'paper': paper_length, 'fixed': fixed_length, 'visible': len(scores)}[normalizer]
    return [f(score / n + b) for score, b in zip(scores, biases, strict=True)]


def quadratic(q, k, v, *, causal, ids=None, function='relu2', normalizer='paper', fixed_length=512, bias=None):
    """sum over visible s of A[t, s] v[s]."""
    n = len(q)
    ids = [1] * n if ids is None else ids
    out = np.zeros((n, v.shape[1]))
    for t in range(n):
        visible = [s for s in range(n) if sees(ids, t, s, causal)]
        if not visible:
            continue
        row = weight_row(
            [q[t] @ k[s] for s in visible],
            q.shape[1],
            function=function,
            normalizer=normalizer,
            paper_length=sum(other == ids[t] for other in ids),
            fixed_length=fixed_length,
            biases=[0.0 if bias is None else bias[t, s] for s in visible],
        )
        for a, s in zip(row, visible, strict=True):
            out[t] += a * v[s]
    return out


def mixed_chunk(
    q, k, q_lin, k_lin, v, *, chunk, causal, ids=None, function='relu2', normalizer='paper', fixed_length=512,
    bias=None, branches='both', reduction='mean',
):  # fmt: skip
    """V_quad + V_lin, token by token."""
    n = len(v)
    ids = [1] * n if ids is None else ids
    out = np.zeros((n, v.shape[1]))
    for t in range(n):
        visible = [s for s in range(n) if sees(ids, t, s, causal)]
        near = [s for s in visible if s // chunk == t // chunk]
        if branches != 'global' and near:
            row = weight_row(
                [q[t] @ k[s] for s in near],
                q.shape[1],
                function=function,
                normalizer=normalizer,
                paper_length=chunk,
                fixed_length=fixed_length,
                biases=[0.0 if bias is None else bias[t % chunk, s % chunk] for s in near],
            )
            for a, s in zip(row, near, strict=True):
                out[t] += a * v[s]
        far = [s for s in visible if s // chunk < t // chunk] if causal else visible
        if branches != 'local' and far:
            state = np.zeros((k_lin.shape[1], v.shape[1]))
            for s in far:
                state += np.outer(k_lin[s], v[s])
            out[t] += q_lin[t] @ state / (len(far) if reduction == 'mean' else 1)
    return out


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


def toeplitz(table, n):
    m = (len(table) + 1) // 2
    return np.array([[table[s - t + m - 1] for s in range(n)] for t in range(n)])


def rotary(a, c, n):
    return np.array([[rope(a, t) @ rope(c, s) for s in range(n)] for t in range(n)])


def gau(params, x, *, causal, positions, chunk=None, use_rope=True, attention=None, **options):
    """The unit of docs/paper.md section 1 (or 3, with `chunk`): one head, parameters as in the Linen module."""
    uv = params['uv']
    u, v = (silu(x @ uv['kernel'][:, i] + uv['bias'][i]) for i in (0, 1))
    z = silu(x @ params['z']['kernel'] + params['z']['bias'])
    gamma, beta = params['query_key']['gamma'][:, 0], params['query_key']['beta'][:, 0]
    roles = [z * g + b for g, b in zip(gamma, beta, strict=True)]
    if use_rope:
        roles = [np.array([rope(row, p) for row, p in zip(role, positions, strict=True)]) for role in roles]
    n = chunk or len(x)
    bias = None
    if 'relative_bias' in params:
        b = params['relative_bias']
        bias = toeplitz(b['table'][0], n) if 'table' in b else rotary(b['a'][0], b['c'][0], n)
    if attention is not None:
        mixed = attention(*roles, v)
    elif chunk:
        mixed = mixed_chunk(*roles, v, chunk=chunk, causal=causal, bias=bias, **options)
    else:
        mixed = quadratic(*roles, v, causal=causal, bias=bias, **options)
    return (u * mixed) @ params['out']['kernel'] + params['out']['bias']
