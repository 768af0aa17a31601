"""What a GPU did, from the profiler's events."""

import jax.numpy as jnp

from gau.benchmarks import kernel_trace

LANES = [
    {'name': 'process_name', 'pid': 1, 'args': {'name': '/device:GPU:0'}},
    {'name': 'process_name', 'pid': 2, 'args': {'name': '/host:CPU'}},
    {'name': 'thread_name', 'pid': 1, 'tid': 1, 'args': {'name': 'Stream #7(Compute)'}},
    {'name': 'thread_name', 'pid': 1, 'tid': 2, 'args': {'name': 'XLA Ops'}},
    {'name': 'thread_name', 'pid': 2, 'tid': 1, 'args': {'name': 'Stream of a host'}},
]


def event(name, ts, dur, pid=1, tid=1):
    return {'ph': 'X', 'name': name, 'pid': pid, 'tid': tid, 'ts': ts, 'dur': dur}


def test_kernels_gaps_and_names():
    events = [
        *LANES,
        event('gemm', 20, 6),
        event('gate', 10, 4),
        # Beside the first one: no gap before what follows both.
        event('gate', 12, 8),
        event('gemm', 30, 2),
        # Not of a stream of the GPU.
        event('module', 0, 100, tid=2),
        event('host', 0, 100, pid=2),
    ]
    found = kernel_trace.kernels(events, steps=2)
    assert found == {
        'kernels': 2,
        'busy_us': 10,
        'gaps_us': 2,
        'median_gap_us': 0,
        'by_name': [['gate', 1, 6], ['gemm', 1, 4]],
    }


def test_a_trace_without_a_gpu_has_no_kernels():
    events = kernel_trace.traced(lambda: jnp.ones(3) + 1)
    assert events
    assert kernel_trace.kernels([e for e in events if 'GPU' not in str(e)], steps=1) is None
