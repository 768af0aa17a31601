import json
import multiprocessing
import os
import pathlib
import signal
import subprocess
import sys
import time
from concurrent import futures

import numpy as np
import pytest

from gau.data import embedded, manifest, passes, pipeline, prepare, shards, sources, tokenizers
from gau.errors import UserError
from gau.objectives import objective as objectives
from tests.data.conftest import make_config, make_texts, write_jsonl

ROOT = pathlib.Path(__file__).resolve().parents[2]


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir() if path.is_file()}


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """Documents enough for a kill to fall between shards, one of them bad."""
    folder = tmp_path_factory.mktemp('source')
    path = write_jsonl(folder / 'c.jsonl', [text * 3 for _, text in embedded.split_text('train')[:200]])
    with path.open('a') as file:
        file.write('{"no text": 1}\n')
    return f'jsonl:{path}'


def command(source, output, *flags):
    script = [sys.executable, str(ROOT / 'scripts/prepare_data.py')]
    return [*script, f'--source={source}', f'--output={output}', '--bad_lines=skip', '--holdout_every=10', *flags]


def test_killed_and_resumed_gives_the_same_bytes(source, tmp_path):
    whole = make_config(source=source, bad_lines='skip', holdout_every=10)
    model = prepare._train_tokenizer(tmp_path / 'm.model', sources.open_split(whole, 'train')[0], 600, 300_000)
    whole.tokenizer = model
    prepare.prepare(whole, tmp_path / 'whole', workers=1)

    output = tmp_path / 'killed'
    arguments = command(source, output, f'--tokenizer={model}', '--workers=2')
    process = subprocess.Popen(arguments, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(output.glob('*.arrayrecord')):
        assert process.poll() is None, 'finished before it could be killed'
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (output / manifest.FILE).exists()
    with pytest.raises(UserError, match='finish preparing it'):
        make_config(source=f'tokens:{output}')
    # The workers notice, and let the directory go.
    deadline = time.monotonic() + 20
    while _alive(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _alive(process.pid)
    done = len(list((output / '.work').glob('*.arrayrecord.json')))
    assert done < 30
    (output / '.work' / 'part-left-behind').write_bytes(b'half a shard')

    subprocess.run(arguments, check=True, capture_output=True)
    assert contents(output) == contents(tmp_path / 'whole')
    assert not (output / '.work').exists()
    # Once more: nothing to do, nothing changes.
    again = subprocess.run(arguments, check=True, capture_output=True, text=True)
    assert 'train on it with' in again.stdout
    assert contents(output) == contents(tmp_path / 'whole')
    written = manifest.read(output)
    assert written['splits']['train']['skipped'] + written['splits']['valid']['skipped'] == 1


def _alive(session):
    """Whether a process of that session (the killed command's) still runs."""
    for status in pathlib.Path('/proc').glob('[0-9]*/stat'):
        try:
            fields = status.read_text().rpartition(')')[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != 'Z':
            return True
    return False


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_until_all_workers_are_started(corpus, tmp_path, monkeypatch, number):
    submit, submitted = futures.ProcessPoolExecutor.submit, []

    def interrupted(pool, *arguments):
        os.kill(os.getpid(), number)
        submitted.append(submit(pool, *arguments))
        return submitted[-1]

    monkeypatch.setattr(futures.ProcessPoolExecutor, 'submit', interrupted)
    config = make_config(source=corpus['jsonl'], holdout_every=10)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(config, tmp_path / 'tokens', workers=2)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)
    plan = json.loads((tmp_path / 'tokens' / prepare._WORK / 'plan.json').read_text())
    assert len(submitted) == len(plan['shards']) > 1
    assert not multiprocessing.active_children()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


_KILLED = """
import multiprocessing, os, signal
from multiprocessing import util
from gau import ctrl_c
spawn = util.spawnv_passfds
def spawn_and_die(path, arguments, descriptors):
    spawn(path, arguments, descriptors)
    if b'spawn_main' in b' '.join(map(os.fsencode, arguments)):
        os.kill(os.getpid(), signal.SIGKILL)
if __name__ == '__main__':
    util.spawnv_passfds = spawn_and_die
    with ctrl_c.starting_workers():
        multiprocessing.get_context('spawn').Process(target=print).start()
"""


def test_a_worker_whose_parent_was_killed_before_it_spoke_says_nothing():
    killed = subprocess.run([sys.executable, '-c', _KILLED], capture_output=True, text=True)
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, '')


def test_terminated_it_says_so_and_goes_on(corpus, tmp_path):
    output = tmp_path / 'tokens'
    command = ['scripts/prepare_data.py', f'--source={corpus["jsonl"]}', '--tokenizer=bytes', f'--output={output}']
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (output / '.work' / 'plan.json').exists():
        time.sleep(0.001)
    process.terminate()
    _, err = process.communicate()
    assert (process.returncode, err.splitlines()[-1]) == (143, 'interrupted: the same command goes on from here')
    assert 'Traceback' not in err
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)


def test_the_manifest_counts_what_is_there(corpus, by_bytes):
    folder = corpus['folder'] / 'tokens'
    written = manifest.read(folder)
    assert written['tokenizer'] == {'spec': 'bytes', 'fingerprint': by_bytes.fingerprint, 'vocab_size': 260}
    assert written['dtype'] == 'uint16'
    config = make_config(source=corpus['tokens'])
    assert config.tokenizer == 'bytes'
    from_text = make_config(source=corpus['jsonl'], holdout_every=10)
    for split in ('train', 'valid'):
        (texts,), (tokens,) = (sources.open_split(c, split) for c in (from_text, config))
        assert len(tokens) == len(texts) == written['splits'][split]['documents']
        for index in range(len(texts)):
            text, document = texts[index].text, tokens[index]
            assert by_bytes.decode(document.tokens) == text
            assert (document.n_bytes, document.n_words) == (len(text.encode()), len(text.split()))
        total = written['splits'][split]
        assert total['tokens'] == total['bytes'] == sum(len(texts[i].text.encode()) for i in range(len(texts)))
        assert total['words'] == sum(len(texts[i].text.split()) for i in range(len(texts)))
    assert pipeline.places_per_epoch(config, by_bytes) == pipeline.places_per_epoch(from_text, by_bytes)


def test_how_often_a_run_passes_over_prepared_tokens_is_read_off_their_manifest(corpus, by_bytes):
    source, places = corpus['tokens'], 100_000
    for objective, packing in (('lm', 'concat'), ('mlm', 'concat'), ('mlm', 'first_fit'), ('lm', 'document')):
        config = make_config(objective, source=source, packing=packing)
        (found,) = objectives.load(objective).passes(config, places).values()
        times = places / pipeline.places_per_epoch(config, by_bytes, objective)
        assert found.exact == (packing == 'concat')
        # How much padding there is, nobody has counted.
        assert found.times == pytest.approx(times) if found.exact else times <= found.times < 2 * times
    mixture = ((3, source), (1, corpus['jsonl']), (4, source))
    mixed = passes.passes(make_config(source='mixture', mixture=mixture), places, frame=1)
    (alone,) = passes.passes(make_config(source=source), places, frame=1).values()
    assert mixed.keys() == {source}
    assert mixed[source].times == pytest.approx(7 / 8 * alone.times)
    assert passes.passes(make_config(source=corpus['jsonl']), places, frame=1) == {}
    assert objectives.load('halves').passes(make_config(source=source), places) == {}
    written = [str(passes.Passes(times, 9, exact)) for times, exact in ((6.61, True), (0.051, True), (23.4, False))]
    assert written == ['6.6', '0.051', '<= 23']
    assert passes.Passes(23.4, 9, exact=False).words == 'at most 23'


def test_large_vocabularies_are_stored_whole(tmp_path):
    tokens = np.array([0, 70_000, 99_999], np.int32)
    assert (shards.token_dtype(2**16), shards.token_dtype(100_000)) == ('uint16', 'int32')
    assert shards.write(tmp_path / 'x', [(tokens, 5, 2)], 'int32') == {
        'documents': 1,
        'tokens': 3,
        'bytes': 5,
        'words': 2,
    }
    contents = {
        'format': manifest.FORMAT,
        'tokenizer': {'spec': 'bytes', 'fingerprint': tokenizers.load('bytes').fingerprint},
        'dtype': 'int32',
        'splits': {'train': {'shards': [{'file': 'x', 'size': (tmp_path / 'x').stat().st_size, 'documents': 1}]}},
    }
    (tmp_path / manifest.FILE).write_text(json.dumps(contents))
    (document,) = [shards.Shards(str(tmp_path), 'train', tokenizers.load('bytes'))[0]]
    np.testing.assert_array_equal(document.tokens, tokens)


def with_a_bad_line(folder, *, bad_lines):
    path = write_jsonl(folder / 'c.jsonl', make_texts(400, longest=8))
    lines = path.read_text('utf-8').splitlines()
    lines[300] = '{"text": null}'
    path.write_text('\n'.join(lines), 'utf-8')
    # Held to one time, because the plan has it.
    os.utime(path, ns=(1, 1))
    return make_config(source=f'jsonl:{path}', holdout_every=10, bad_lines=bad_lines)


def test_a_bad_line_can_be_left_out_when_it_is_met(tmp_path):
    (tmp_path / 'whole').mkdir()
    prepare.prepare(with_a_bad_line(tmp_path, bad_lines='skip'), tmp_path / 'whole', workers=1)
    with pytest.raises(UserError, match=r'c.jsonl:301: the field "text" is NoneType.*data.bad_lines="skip" leaves'):
        prepare.prepare(with_a_bad_line(tmp_path, bad_lines='error'), tmp_path / 'out', workers=1)
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / 'out').glob('*.arrayrecord')}
    assert done
    prepare.prepare(with_a_bad_line(tmp_path, bad_lines='skip'), tmp_path / 'out', workers=1)
    assert {path: path.stat().st_mtime_ns for path in done} == done, 'what was done stays done'
    assert contents(tmp_path / 'out') == contents(tmp_path / 'whole')
    # The finished directory is that of either policy.
    prepare.prepare(with_a_bad_line(tmp_path, bad_lines='error'), tmp_path / 'out', workers=1)


def test_a_moved_project_goes_on_preparing(tmp_path):
    here, there = tmp_path / 'here', tmp_path / 'there'
    here.mkdir()
    with pytest.raises(UserError, match=r'c.jsonl:301'):
        prepare.prepare(with_a_bad_line(here, bad_lines='error'), here / 'out', workers=1)
    done = len(list((here / 'out').glob('*.arrayrecord')))
    assert done
    here.rename(there)
    config = make_config(source=f'jsonl:{there}/c.jsonl', holdout_every=10, bad_lines='skip')
    prepare.prepare(config, there / 'out', workers=1)
    assert manifest.read(there / 'out')['splits']['train']['skipped'] == 1
    # Other files are another preparation.
    os.utime(there / 'c.jsonl', ns=(2, 2))
    with pytest.raises(UserError, match='another preparation'):
        prepare.prepare(config, there / 'out', workers=1)


def test_other_contents_are_never_overwritten(corpus, tmp_path):
    config = make_config(source=corpus['jsonl'])
    (tmp_path / 'thesis.tex').write_text('years of work')
    with pytest.raises(UserError, match=r'holds something else \(thesis.tex\)'):
        prepare.prepare(config, tmp_path)
    assert contents(tmp_path) == {'thesis.tex': b'years of work'}
    with pytest.raises(UserError, match=r'another preparation \(options: {"holdout_every": 10} there, {.*: 50} now\)'):
        prepare.prepare(config, corpus['folder'] / 'tokens')
    (tmp_path / 'file').touch()
    with pytest.raises(UserError, match='cannot write there'):
        prepare.prepare(config, tmp_path / 'file')


def test_a_refused_call_leaves_a_finished_directory_as_it_was(corpus, tmp_path):
    prepare.prepare(make_config(source=corpus['jsonl'], holdout_every=10), tmp_path, workers=1)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match='another preparation'):
        prepare.prepare(make_config(source=corpus['jsonl']), tmp_path)
    assert sorted(tmp_path.iterdir()) == before


def test_the_tokenizer_is_trained_on_the_training_split_whatever_is_written(corpus, tmp_path):
    config = make_config(source=corpus['jsonl'], holdout_every=4)
    both = prepare.prepare(config, tmp_path / 'both', train_tokenizer=300, workers=1)
    alone = prepare.prepare(config, tmp_path / 'valid', train_tokenizer=300, splits=['valid'], workers=1)
    assert list(alone['splits']) == ['valid']
    assert alone['tokenizer'] == both['tokenizer']
    assert alone['splits']['valid'] == both['splits']['valid']


def test_another_plan_may_replace_one_without_shards(corpus, tmp_path):
    config = make_config(source=corpus['jsonl'], holdout_every=10)
    with pytest.raises(UserError, match='--train_tokenizer=50000: SentencePiece says'):
        prepare.prepare(config, tmp_path, train_tokenizer=50_000)
    # As if killed when the tokenizer was there, but no shard.
    (tmp_path / 'tokenizer.model').write_bytes(b'of another size')
    contents = prepare.prepare(config, tmp_path, train_tokenizer=310, workers=1)
    assert contents['tokenizer']['vocab_size'] == 310
    assert contents['plan']['tokenizer']['train'] == 310


def test_a_plan_with_shards_is_kept(corpus, tmp_path):
    config = make_config(source=corpus['jsonl'], holdout_every=10)
    prepare.prepare(config, tmp_path, workers=1)
    (tmp_path / '.work').mkdir()
    (tmp_path / '.work/plan.json').write_text(json.dumps(manifest.read(tmp_path)['plan']))
    (tmp_path / manifest.FILE).unlink()
    with pytest.raises(UserError, match='another preparation'):
        prepare.prepare(config, tmp_path, train_tokenizer=300)
    assert (tmp_path / '.work/plan.json').exists()


def test_two_at_once_are_refused(corpus, tmp_path):
    with prepare._claim(tmp_path / 'out'), pytest.raises(UserError, match='another process is preparing it'):
        prepare.prepare(make_config(source=corpus['jsonl']), tmp_path / 'out')


def test_damaged_shards_and_other_tokenizers_are_refused(corpus, tmp_path):
    config = make_config(source=corpus['jsonl'])
    prepare.prepare(config, tmp_path, workers=1)
    prepared = make_config(source=f'tokens:{tmp_path}')
    model = tmp_path / 'm.model'
    prepare._train_tokenizer(model, sources.open_split(make_config(), 'valid')[0], 500, 60_000)
    prepared.tokenizer = f'sentencepiece:{model}'
    with pytest.raises(UserError, match='was prepared with the tokenizer bytes'):
        sources.open_split(prepared, 'train')
    prepared.tokenizer = 'bytes'
    (shard, *_) = sorted(tmp_path.glob('train-*'))
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(UserError, match=rf'{shard.name}: \d+ bytes, where the manifest says'):
        sources.open_split(prepared, 'train')
    shard.unlink()
    with pytest.raises(UserError, match=rf'{shard.name}: missing'):
        sources.open_split(prepared, 'train')
    (tmp_path / manifest.FILE).write_text(json.dumps({'format': 'other'}))
    with pytest.raises(UserError, match='not a manifest of prepared tokens'):
        make_config(source=f'tokens:{tmp_path}')


@pytest.mark.parametrize(
    ('flags', 'message'),
    [
        ([], 'give one of --tokenizer and --train_tokenizer'),
        (['--tokenizer=bytes', '--train_tokenizer=300'], 'give one of --tokenizer and --train_tokenizer'),
        (['--tokenizer=bytes', '--splits=train,vaild'], 'unknown split "vaild"; did you mean "valid"?'),
        (['--tokenizer=bytes', '--text_field=txet'], 'no field "txet"'),
    ],
)
def test_the_command_complains_in_one_line(corpus, tmp_path, flags, message):
    script = [sys.executable, str(ROOT / 'scripts/prepare_data.py'), f'--source={corpus["jsonl"]}']
    result = subprocess.run([*script, f'--output={tmp_path}/out', *flags], capture_output=True, text=True)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count('\n') == 1
