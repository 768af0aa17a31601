"""An export under EleutherAI's lm-eval, with a task of this machine: the log-likelihood that our model gives."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

import gau
from gau.export.exporting import export
from gau.training import loop
from tests.data.conftest import write_jsonl
from tests.training.tiny import tiny_config

pytest.importorskip('transformers', minversion='5.24', reason='requirements-export.txt')
huggingface = pytest.importorskip('lm_eval.models.huggingface', reason='pip install "lm-eval[hf]"')
pytestmark = pytest.mark.slow

# Shorter than the context, which lm-eval would cut elsewhere than we do.
TEXTS = ['def f(x): return x + 1', 'the gate unit é 漢字', 'import numpy as np\n']


def test_log_likelihoods_of_a_local_task_are_ours(tmp_path, monkeypatch):
    import lm_eval

    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    monkeypatch.setenv('HF_HOME', str(tmp_path / 'cache'))
    loop.train(tiny_config(), tmp_path / 'run')
    export(tmp_path / 'run', tmp_path / 'out', format='huggingface')
    write_jsonl(tmp_path / 'texts.jsonl', TEXTS)
    task = {
        'task': 'local_texts',
        'dataset_path': 'json',
        'dataset_kwargs': {'data_files': {'test': str(tmp_path / 'texts.jsonl')}},
        'test_split': 'test',
        'output_type': 'loglikelihood_rolling',
        'doc_to_text': '',
        'doc_to_target': '{{text}}',
        'metric_list': [{'metric': 'bits_per_byte'}],
    }
    # lm-eval puts BOS before a text that it scores whole; the tokenizer must not do so as well.
    fields = {'trust_remote_code': True, 'device': 'cpu', 'batch_size': 1, 'add_bos_token': False}
    model = huggingface.HFLM(str(tmp_path / 'out'), **fields)
    found = lm_eval.simple_evaluate(model, tasks=[task], bootstrap_iters=0)['results']['local_texts']

    run, params, _ = gau.load_run(tmp_path / 'run')
    nats = 0.0
    for text in TEXTS:
        tokens = run.tokenizer.encode(text)
        inputs = np.concatenate([[run.tokenizer.bos_id], tokens[:-1]])
        losses = run.model.apply(
            {'params': params}, jnp.asarray([inputs]), jnp.asarray([tokens]), method='token_losses'
        )
        nats += float(losses.sum())
    expected = nats / np.log(2) / sum(len(text.encode()) for text in TEXTS)
    assert abs(found['bits_per_byte,none'] - expected) < 1e-5 * expected, json.dumps(found)
