from gau.data import embedded


def test_the_corpus_is_stable_and_split_by_name():
    embedded._documents.cache_clear()
    train, valid = (embedded.split_text(split) for split in embedded.SPLITS)
    assert not {name for name, _ in train} & {name for name, _ in valid}
    assert [name for name, _ in train] == sorted(name for name, _ in train)
    # Membership hangs on the name alone, so these never move.
    assert 'argparse.py' in dict(train)
    assert 'abc.py' in dict(valid)
    assert 5e6 < sum(len(text.encode()) for _, text in train) < 20e6
    assert 2e5 < sum(len(text.encode()) for _, text in valid) < 8e5
    names = [name for name, _ in train + valid]
    for part in (
        'site-packages',
        '/test/',
        'idlelib',
        'tkinter',
        'lib2to3',
        'distutils',
        'ensurepip',
        '_sysconfigdata',
    ):
        assert not [name for name in names if part in name]
