import json
import random

import pytest
from ml_collections import ConfigDict

from gau.data import config as data_config
from gau.data import prepare, tokenizers

TEXT = 'the gate unit holds attention over short chunks while linear memory é 漢字 carries what came before'


def make_texts(count, seed=0, longest=60):
    rng = random.Random(seed)
    return [f'{i} ' + ' '.join(rng.choices(TEXT.split(), k=rng.randint(1, longest))) for i in range(count)]


def write_jsonl(path, texts):
    path.write_text(''.join(json.dumps({'text': text, 'id': i}) + '\n' for i, text in enumerate(texts)), 'utf-8')
    return path


def make_config(objective='lm', **fields) -> ConfigDict:
    """A resolved data config with small rows; fields of data.mlm as mlm_NAME."""
    config = data_config.default_config()
    config.context, config.batch_size = 32, 6
    for name, value in fields.items():
        if name.startswith('mlm_'):
            config.mlm[name.removeprefix('mlm_')] = value
        else:
            config[name] = value
    return data_config.resolve(config, objective=objective)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory):
    """A JSON-lines file of 40 documents, its texts, and the same as prepared tokens."""
    folder = tmp_path_factory.mktemp('corpus')
    texts = make_texts(40)
    path = write_jsonl(folder / 'corpus.jsonl', texts)
    config = make_config(source=f'jsonl:{path}', holdout_every=10)
    prepare.prepare(config, folder / 'tokens', workers=1)
    return {'texts': texts, 'jsonl': f'jsonl:{path}', 'tokens': f'tokens:{folder / "tokens"}', 'folder': folder}


@pytest.fixture(scope='session')
def by_bytes():
    return tokenizers.load('bytes')
