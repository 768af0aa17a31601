import sys

import numpy as np
import pytest

from gau.data import pipeline, sources, tokenizers
from gau.errors import UserError
from tests.data.conftest import make_config, make_texts


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """A data set built here as ArrayRecord files, and its training texts."""
    import tensorflow_datasets as tfds

    texts = make_texts(30)

    class Toy(tfds.core.GeneratorBasedBuilder):
        # A dotted name makes tfds look for this file through a package that only building, not reading, asks for.
        __module__ = 'toy'
        VERSION = tfds.core.Version('1.0.0')
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name='en'),)

        def _info(self):
            features = {
                'text': tfds.features.Text(),
                'title': tfds.features.Text(),
                'n': tfds.features.Scalar(np.int64),
            }
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, download_manager):
            return {'train': self._generate_examples(texts), 'validation': self._generate_examples(make_texts(5, 1))}

        def _generate_examples(self, texts):
            for number, text in enumerate(texts):
                yield number, {'text': text, 'title': f'title {number}', 'n': number}

    folder = tmp_path_factory.mktemp('tfds')
    Toy(data_dir=folder, config='en', file_format='array_record').download_and_prepare()
    Toy(data_dir=folder / 'other', config='en', file_format='array_record').download_and_prepare()
    return folder, texts


def test_a_built_data_set_is_read_without_tensorflow(built):
    folder, texts = built
    config = make_config(source='tfds:toy/en', tfds_dir=str(folder))
    assert sources.splits(config) == ['train', 'valid']
    (documents,) = sources.open_split(config, 'train')
    assert sorted(documents[i].text for i in range(len(documents))) == sorted(texts)
    (titles,) = sources.open_split(make_config(source='tfds:toy/en', tfds_dir=str(folder), text_field='title'), 'valid')
    assert titles[0].text.startswith('title')
    tokenizer = tokenizers.load('bytes')
    iterator = pipeline.train_iterator(config, objective='lm', tokenizer=tokenizer, seed=0)
    assert next(iterator)['inputs'].shape == (6, 32)
    assert pipeline.places_per_epoch(config, tokenizer) == sum(len(text.encode()) + 1 for text in texts)
    found = sources.identity(config)['tfds:toy/en']
    assert found.startswith('toy/en/1.0.0, train: 30 in ')
    assert 'validation: 5 in ' in found
    assert 'tensorflow' not in sys.modules


@pytest.mark.parametrize(
    ('source', 'fields', 'message'),
    [
        ('tfds:toy/de', {}, 'tfds:toy/de is not built in'),
        ('tfds:toy', {}, 'tfds:toy is not built in'),
        ('tfds:toy/en:9.9.9', {}, 'is not built in'),
        ('tfds:toy/en', {'text_field': 'txt'}, 'no field "txt".*did you mean "text"'),
    ],
)
def test_what_is_not_there_is_said(built, source, fields, message):
    with pytest.raises(UserError, match=message):
        sources.open_split(make_config(source=source, tfds_dir=str(built[0]), **fields), 'train')


def test_fields_that_hold_no_text_are_refused(built):
    (documents,) = sources.open_split(
        make_config(source='tfds:toy/en:1.0.0', tfds_dir=str(built[0]), text_field='n'), 'train'
    )
    with pytest.raises(UserError, match='the field "n" is int, not text'):
        documents[0]


def test_other_file_formats_are_refused(built):
    info = built[0] / 'other/toy/en/1.0.0/dataset_info.json'
    info.write_text(info.read_text().replace('array_record', 'tfrecord'))
    with pytest.raises(UserError, match='is built as tfrecord: build it with file_format=array_record'):
        sources.open_split(make_config(source='tfds:toy/en', tfds_dir=str(built[0] / 'other')), 'train')
