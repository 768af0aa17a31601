"""Which kernels a GPU ran, how often and how long, and how long it waited between them, by JAX's profiler."""

import collections
import gzip
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from gau.errors import UserError

# As many names are told.
MOST = 20


def profile(run: Callable[[], Any], *, steps: int) -> dict[str, Any]:
    """Returns what `kernels` says of a function that makes so many steps.

    Raises:
      UserError: there is no GPU.
    """
    found = kernels(traced(run), steps=steps)
    if found is None:
        raise UserError(f'--profile lists the kernels of a GPU, this is {jax.devices()[0].platform}')
    return found


def traced(run: Callable[[], Any]) -> list[dict]:
    """Runs a function until its results are there; returns the profiler's events, in Chrome's trace format."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob('*.trace.json.gz')
        return json.loads(gzip.decompress(path.read_bytes()))['traceEvents']


def kernels(events: Iterable[Mapping], *, steps: int) -> dict[str, Any] | None:
    """Returns what a GPU did in each of so many steps, in microseconds; None where no GPU was traced.

    Returns:
      `kernels`, their number; `busy_us`, the sum of their times; `gaps_us`, of those between one's end and the next's
      start; `median_gap_us`; and `by_name`, [name, number, microseconds] of those that took longest.
    """
    events = list(events)
    process, lane = {}, {}
    for event in events:
        if event.get('name') == 'process_name':
            process[event['pid']] = event['args']['name']
        if event.get('name') == 'thread_name':
            lane[event['pid'], event['tid']] = event['args']['name']
    ran = [
        event
        for event in events
        if event.get('ph') == 'X'
        and 'GPU' in process.get(event['pid'], '')
        and lane.get((event['pid'], event['tid']), '').startswith('Stream')
    ]
    if not ran:
        return None
    ran.sort(key=lambda event: event['ts'])
    by_name = collections.defaultdict(lambda: [0, 0.0])
    for event in ran:
        by_name[event['name']][0] += 1
        by_name[event['name']][1] += event['dur']
    gaps, end = [], ran[0]['ts']
    for event in ran:
        gaps.append(max(0.0, event['ts'] - end))
        end = max(end, event['ts'] + event['dur'])
    longest = sorted(by_name.items(), key=lambda item: -item[1][1])[:MOST]
    return {
        'kernels': len(ran) / steps,
        'busy_us': sum(event['dur'] for event in ran) / steps,
        'gaps_us': sum(gaps) / steps,
        'median_gap_us': sorted(gaps)[len(gaps) // 2],
        'by_name': [[name, number / steps, microseconds / steps] for name, (number, microseconds) in longest],
    }
