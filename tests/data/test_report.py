import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from gau.data import report
from tests.data.conftest import make_config
from tests.data.test_pipeline import evaluation
from tests.programs import call

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_survey_counts_everything_or_a_sample(corpus, by_bytes):
    config = make_config(source=corpus['jsonl'], holdout_every=10)
    found = report.survey(config, 'train', by_bytes, at_most=1000)
    assert (found.documents, found.surveyed, found.left_out, found.changed) == (36, 36, 0, 0)
    assert found.lengths.sum() == found.n_bytes
    assert report.survey(config, 'train', by_bytes, at_most=7).surveyed == 7
    tokens = report.survey(make_config(source=corpus['tokens']), 'train', by_bytes, at_most=1000)
    np.testing.assert_array_equal(tokens.lengths, found.lengths)
    assert (tokens.n_bytes, tokens.n_words, tokens.changed) == (found.n_bytes, found.n_words, None)


def test_histogram_and_plot(tmp_path):
    lines = report.histogram(np.array([0, 1, 2, 3, 3, 1000]))
    assert sum(int(line.split()[3].replace(',', '')) for line in lines) == 6
    assert lines[-1].split()[:3] == ['512', '..', '1,023']
    report.plot(np.array([0, 5, 700]), 512, tmp_path / 'x.png')
    assert (tmp_path / 'x.png').read_bytes().startswith(b'\x89PNG')


def test_packing_is_measured(corpus):
    batches = evaluation(make_config(source=corpus['tokens'], packing='document', context=600), context=600)
    packed = report.packing(batches)
    real = sum((batch['segment_ids'] > 0).sum() for batch in batches)
    assert packed.filled == pytest.approx(real / sum(batch['inputs'].size for batch in batches))
    assert packed.documents <= 1


def test_rendering_shows_borders_and_masks(by_bytes):
    ids = dict(bos=by_bytes.bos_id, eos=by_bytes.eos_id, pad=by_bytes.pad_id, mask=by_bytes.mask_id)
    a, b, c = b'abc'
    batch = {
        'inputs': np.array([[ids['bos'], a, ids['mask'], ids['mask'], c, ids['eos'], ids['bos'], b, ids['pad']]]),
        'targets': np.array([[ids['bos'], a, b, c, a, ids['eos'], ids['bos'], b, ids['pad']]]),
        'weights': np.array([[0, 0, 1, 1, 1, 0, 0, 1, 0]], np.float32),
        'segment_ids': np.array([[1, 1, 1, 1, 1, 1, 2, 2, 0]]),
    }
    shown = report.render(batch, 0, by_bytes, 'mlm')
    assert shown == '|1|<BOS>a{MASK -> bc}{c -> a}<EOS>|2|<BOS>{b}<PAD x 1>'
    assert report.render(batch, 0, by_bytes, 'lm') == '|1|<BOS>a<MASK><MASK>c<EOS>|2|<BOS>b<PAD x 1>'


@pytest.mark.slow
def test_the_scripts_run(corpus, tmp_path):
    common = ['--config=configs/mlm.py:runlocal', f'--config.data.source={corpus["tokens"]}']
    inspect = [sys.executable, 'scripts/inspect_data.py', *common, f'--plot={tmp_path}/p.png']
    shown = subprocess.run(inspect, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert 'packing first_fit' in shown
    assert '{MASK -> ' in shown
    assert (tmp_path / 'p.png').exists()
    benchmark = [sys.executable, 'scripts/benchmark_data.py', *common, '--seconds=0.3']
    result = subprocess.run(benchmark, capture_output=True, text=True, cwd=ROOT, check=True).stdout
    assert json.loads(result.splitlines()[-1])['tokens_per_second'] > 0


def test_what_would_do_nothing_is_one_line():
    code, out, err = call('scripts/inspect_data.py', '--config=configs/lm.py:runlocal', '--paragraphs=blank_line')
    assert (code, out, err.count('\n')) == (2, '', 1)
    assert 'it is of --chunks' in err
