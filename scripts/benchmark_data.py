"""Measures the input pipeline alone: tokens a second, time to the first batch and to a resume, resident memory.

python scripts/benchmark_data.py --config=configs/lm.py:context=1024 --config.data.source=tokens:DIR
"""

import json
import os
import resource
import sys
import time

import _root  # noqa: F401
from absl import flags

from gau import cli
from gau.data import pipeline, tokenizers
from gau.training import config as training_config

cli.define_config()
_SECONDS = flags.DEFINE_float('seconds', 10.0, 'How long to measure', lower_bound=0.1)
_STEP = flags.DEFINE_float('step_seconds', 0.0, 'Sleep so long each batch, as if a device computed', lower_bound=0.0)


def main() -> None:
    """Prints one line of JSON after a line for people."""
    config = training_config.resolve(cli.load_config())
    data = config.data
    tokenizer = tokenizers.load(data.tokenizer)
    before = _resident_mb()

    def start():
        return pipeline.train_iterator(data, objective=config.objective, tokenizer=tokenizer, seed=config.seed)

    begin = time.perf_counter()
    iterator = start()
    next(iterator)
    first = time.perf_counter() - begin
    batches, tokens, waited = 0, 0, 0.0
    begin, processor = time.perf_counter(), time.process_time()
    while (elapsed := time.perf_counter() - begin) < _SECONDS.value:
        asked = time.perf_counter()
        batch = next(iterator)
        waited += time.perf_counter() - asked
        batches += 1
        tokens += int((batch['segment_ids'] > 0).sum()) if 'segment_ids' in batch else batch['inputs'].size
        if _STEP.value:
            time.sleep(_STEP.value)
    elapsed = time.perf_counter() - begin
    processor = time.process_time() - processor
    state = iterator.get_state()
    iterator.close()
    begin = time.perf_counter()
    resumed = start()
    resumed.set_state(json.loads(json.dumps(state)))
    next(resumed)
    resume = time.perf_counter() - begin
    resumed.close()
    result = {
        'source': data.source,
        'tokenizer': data.tokenizer,
        'objective': config.objective,
        'packing': data.packing,
        'context': data.context,
        'batch_size': data.batch_size,
        'tokens_per_second': round(tokens / elapsed),
        'tokens_per_cpu_second': round(tokens / processor),
        'cores': os.cpu_count(),
        'waited_share': round(waited / elapsed, 3),
        'first_batch_seconds': round(first, 3),
        'resume_seconds': round(resume, 3),
        'state_bytes': len(json.dumps(state)),
        'resident_mb': round(_resident_mb()),
        'resident_mb_before': round(before),
        'peak_mb': round(
            resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == 'darwin' else 2**10)
        ),
    }
    print(
        f'{result["tokens_per_second"] / 1e6:.2f} M tokens/s, first batch after {first:.2f} s, '
        f'resumed in {resume:.2f} s, {result["resident_mb"]} MB resident ({result["resident_mb_before"]} before)'
    )
    print(json.dumps(result))


def _resident_mb() -> float:
    """Resident memory now; without /proc, the peak so far."""
    try:
        with open('/proc/self/statm') as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == '__main__':
    cli.run(main)
