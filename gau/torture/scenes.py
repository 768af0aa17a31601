"""Faults of machines and people: signals, full disks, what can only be read, clocks, two programs at once."""

import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gau.torture.lab import Done, Lab, checkpoints, compare_runs, json_lines, same_files, sweep_results
from gau.torture.tally import Tally

_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# How a program ends that has been asked to: by the signal itself before it catches it, or saved.
_ENDS = {
    signal.SIGKILL: (-signal.SIGKILL,),
    signal.SIGTERM: (-signal.SIGTERM, 128 + signal.SIGTERM),
    signal.SIGINT: (-signal.SIGINT, 128 + signal.SIGINT),
}


def _lost_another(done: Done) -> bool:
    """Returns whether a process says last, and in one line, that another one of its run has died or never came."""
    last = (done.err.rstrip().splitlines() or [''])[-1]
    return (done.code, last.startswith('error: another process of this run')) == (1, True) or (
        (done.code, last.startswith('error: the processes could not be joined')) == (2, True)
    )


def _killed_in_training(lab: Lab, tally: Tally, *, processes: int, times: int) -> None:
    name, workdir = ('train.py', 'two')[processes - 1], lab.new('killed')
    reference = lab.trained if processes == 1 else lab.trained_by_two
    before: list[int] = []

    def check(done: Done, what: str) -> None:
        resumed = re.search(r'resumed at step (\d+)', done.err)
        if 'new run' in done.err or resumed:
            found = int(resumed[1]) if resumed else 0
            tally.loses(max(before, default=0) - found, f'{what}: step {found} of {before}')

    def start() -> list[subprocess.Popen]:
        arguments = lab.train(workdir, processes=processes)
        return [lab.start(arguments)] if processes == 1 else lab.start_two(arguments)

    for _ in range(times):
        if (workdir / 'final.json').exists():
            break
        signum = lab.rng.choice(_SIGNALS)
        whom = [lab.rng.randrange(processes)]
        ended = lab.signalled(start(), name, signum, whom=whom)
        what = f'{signal.Signals(signum).name} in training'
        tally.runs += processes
        tally.faults += ended[0].met
        check(ended[0], what)
        for number, done in enumerate(ended):
            tally.prints(what, done.err)
            lost = number not in whom and _lost_another(done)
            if done.met and done.left_alone and done.code not in (0, *_ENDS[signum]) and not lost:
                tally.differs(f'{what}: exit code {done.code} of process {number}: {done.err[-300:]}')
        said = re.search(r'saved at step (\d+)', ended[0].err)
        before[:] = checkpoints(workdir)
        if said and int(said[1]) not in before:
            tally.loses(1, f'{what}: said to be saved at step {said[1]}, there is {before}')
    tally.runs += processes
    for done in lab.finish(start()):
        tally.prints('after signals', done.err)
        if done.code != 0:
            return tally.differs(f'after signals: exit code {done.code}: {done.err[-500:]}')
        check(done, 'after signals')
    different = compare_runs(workdir, reference)
    if different:
        tally.differs(f'after signals: {different} in {workdir}')
    return None


def training(lab: Lab, tally: Tally) -> None:
    """Signals to one run after the other; then it ends as one that nobody disturbed."""
    _killed_in_training(lab, tally, processes=1, times=6)


def training_of_two(lab: Lab, tally: Tally) -> None:
    """The same with two processes, of which one gets the signal."""
    _killed_in_training(lab, tally, processes=2, times=4)


def preparing(lab: Lab, tally: Tally) -> None:
    """Signals while tokens are prepared; shards that were whole stay as they are."""
    output, reference = lab.new('prepared'), lab.tokens
    for _ in range(5):
        signum = lab.rng.choice(_SIGNALS)
        (done,) = lab.signalled([lab.start(lab.prepare(output))], 'scripts/prepare_data.py', signum)
        what = f'{signal.Signals(signum).name} in preparing'
        tally.runs += 1
        tally.faults += done.met
        tally.prints(what, done.err)
        finished = (output / 'manifest.json').exists()
        notes = {path.name for path in output.glob('.work/*.json')}
        shards = [path for path in output.glob('*.arrayrecord') if finished or f'{path.name}.json' in notes]
        whole = {path: path.stat().st_mtime_ns for path in shards}
        if lab.rng.random() < 0.5:
            continue
        tally.runs += 1
        done = lab.run(lab.prepare(output))
        tally.prints(f'after {what}', done.err)
        gone = sum(not path.exists() or path.stat().st_mtime_ns != written for path, written in whole.items())
        tally.loses(gone, f'after {what}: shards written again')
        if done.code != 0 or not same_files(output, reference):
            tally.differs(f'after {what}: code {done.code}, {output}: {done.err[-300:]}')
        output = lab.new('prepared')


def sweeping(lab: Lab, tally: Tally) -> None:
    """A signal to a sweep, whose runs end with it; the same command finishes it."""
    reference, workdir = lab.swept, lab.new('swept')
    for _ in range(2):
        signum = lab.rng.choice(_SIGNALS)
        (done,) = lab.signalled([lab.start(lab.sweep(workdir))], 'scripts/sweep.py', signum)
        tally.runs += 1
        tally.faults += done.met
        tally.prints(f'{signal.Signals(signum).name} in a sweep', done.err)
    done = lab.run(lab.sweep(workdir))
    tally.runs += 1
    tally.prints('after signals to a sweep', done.err)
    if done.code != 0 or sweep_results(workdir) != reference:
        tally.differs(f'sweep after signals: code {done.code}, {workdir}: {done.err[-300:]}')


def evaluating(lab: Lab, tally: Tally) -> None:
    """Signals to eval.py; what it has written before stays, and it finds the same again."""
    reference, workdir = lab.row, lab.copy(lab.trained)
    for _ in range(5):
        signum = lab.rng.choice(_SIGNALS)
        (done,) = lab.signalled([lab.start(lab.evaluate(workdir))], 'eval.py', signum)
        tally.runs += 1
        tally.faults += done.met
        tally.prints(f'{signal.Signals(signum).name} in evaluating', done.err)
    done = lab.run(lab.evaluate(workdir))
    tally.runs += 1
    tally.prints('eval.py after signals', done.err)
    rows = json_lines(workdir / 'eval.jsonl')
    if done.code != 0 or not rows or any(row != reference for row in rows):
        tally.differs(f'eval.py after signals: {workdir}: {done.err[-300:]}')


def sampling(lab: Lab, tally: Tally) -> None:
    """Signals to sample.py, which leaves nothing behind and writes the same text again."""
    reference = lab.text
    for _ in range(4):
        signum = lab.rng.choice(_SIGNALS)
        (done,) = lab.signalled([lab.start(lab.sample(lab.trained))], 'scripts/sample.py', signum)
        tally.runs += 1
        tally.faults += done.met
        tally.prints(f'{signal.Signals(signum).name} in sampling', done.err)
    done = lab.run(lab.sample(lab.trained))
    tally.runs += 1
    if done.code != 0 or done.out != reference:
        tally.differs(f'sample.py after signals: {done.err[-300:]}')


def full_disk(lab: Lab, tally: Tally) -> None:
    """A file system of a few hundred kB, or a limit on the size of files; then there is room, and the work goes on."""
    for kind in ('limit', 'disk'):
        workdir = lab.new('full')
        before: list[int] = []
        if kind == 'limit':
            done = lab.run(lab.train(workdir), largest_file=lab.rng.randrange(2_000, 60_000))
            before = checkpoints(workdir)
        else:
            with _file_system(f'size={lab.rng.randrange(150, 900)}k') as mounted:
                if mounted is None:
                    continue
                done = lab.run(lab.train(mounted / 'run'))
                before = checkpoints(mounted / 'run')
                if (mounted / 'run').exists():
                    shutil.copytree(mounted / 'run', workdir)
        tally.runs += 2
        tally.faults += 1
        tally.prints(f'full {kind}', done.err)
        lines = done.err.count('error: ')
        if done.code not in (0, 1, 2) or (done.code and lines != 1):
            tally.differs(f'full {kind}: exit code {done.code}, {lines} lines: {done.err[-500:]}')
        tally.refused += done.code != 0
        done = lab.run(lab.train(workdir))
        tally.prints(f'after a full {kind}', done.err)
        resumed = re.search(r'resumed at step (\d+)', done.err)
        tally.loses(max(before, default=0) - int(resumed[1] if resumed else 0), f'after a full {kind}')
        different = compare_runs(workdir, lab.trained) if done.code == 0 else done.err[-500:]
        if different:
            tally.differs(f'after a full {kind}: {different} in {workdir}')
    _full_while_preparing(lab, tally)


def _full_while_preparing(lab: Lab, tally: Tally) -> None:
    output, reference = lab.new('full'), lab.tokens
    done = lab.run(lab.prepare(output), largest_file=lab.rng.randrange(500, 8_000))
    tally.runs += 2
    tally.faults += 1
    tally.refused += done.code != 0
    tally.prints('full in preparing', done.err)
    done = lab.run(lab.prepare(output))
    tally.prints('after full in preparing', done.err)
    if done.code != 0 or not same_files(output, reference):
        tally.differs(f'preparing after a full disk: code {done.code}, {output}: {done.err[-300:]}')


def read_only(lab: Lab, tally: Tally) -> None:
    """A run on a file system that is mounted to be read: it can be evaluated and sampled, and says what it cannot."""
    with _file_system('size=4m') as mounted:
        if mounted is None:
            return
        shutil.copytree(lab.trained, mounted / 'run')
        subprocess.run(['mount', '-o', 'remount,ro', str(mounted)], check=True)
        for arguments, code, said in (
            (lab.evaluate(mounted / 'run'), 0, 'cannot be written'),
            (lab.sample(mounted / 'run'), 0, ''),
            (lab.train(mounted / 'run'), 2, 'cannot be written'),
            (lab.prepare(mounted / 'tokens'), 2, 'cannot write there'),
        ):
            done = lab.run(arguments)
            tally.runs += 1
            tally.faults += 1
            tally.refused += done.code != 0
            tally.prints(f'{arguments[0]} of what can only be read', done.err)
            told = ('bits per byte' in done.out) == (arguments[0] == 'eval.py')
            if done.code != code or said not in done.err or not told:
                tally.differs(f'{arguments[0]} of what can only be read: {done.code}: {done.out} {done.err[-300:]}')


@contextmanager
def _file_system(options: str) -> Iterator[Path | None]:
    """Yields a small file system of its own; None where this process may not make one."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix='gau_mounted_') as directory:
        command = ['mount', '-t', 'tmpfs', '-o', options, 'tmpfs', directory]
        try:
            mounted = subprocess.run(command, capture_output=True).returncode == 0
        except OSError:
            mounted = False
        try:
            yield Path(directory) if mounted else None
        finally:
            if mounted:
                subprocess.run(['umount', '-l', directory], check=True)


def clock(lab: Lab, tally: Tally) -> None:
    """A clock that jumps by days, forward and back."""
    day = 86_400
    jumps = [lab.rng.choice((-1, 1)) * lab.rng.uniform(0, 400 * day) for _ in range(5)]
    workdir, output = lab.new('clock'), lab.new('clock')
    tally.faults += 2
    tally.runs += 2
    done = lab.run(lab.train(workdir), clock=jumps)
    tally.prints('training under a jumping clock', done.err)
    if done.code == 1 and 'not done in time' in done.err:
        # By the clock it has hung for days.
        tally.refused += 1
        tally.runs += 1
        done = lab.run(lab.train(workdir))
    different = compare_runs(workdir, lab.trained) if done.code == 0 else done.err[-500:]
    if different:
        tally.differs(f'training under a jumping clock: {different} in {workdir}')
    done = lab.run(lab.prepare(output), clock=jumps)
    tally.prints('preparing under a jumping clock', done.err)
    if done.code != 0 or not same_files(output, lab.tokens):
        tally.differs(f'preparing under a jumping clock: {output}: {done.err[-300:]}')


def two_programs(lab: Lab, tally: Tally) -> None:
    """Two programs that write into one directory, of which one refuses; and one that reads meanwhile."""
    workdir, output = lab.new('shared'), lab.new('shared')
    for arguments, same in (
        (lab.train(workdir), lambda: not compare_runs(workdir, lab.trained)),
        (lab.prepare(output), lambda: same_files(output, lab.tokens)),
    ):
        ended = lab.finish([lab.start(arguments), lab.start(arguments)])
        tally.runs += 2
        tally.faults += 1
        for done in ended:
            tally.prints(f'two of {arguments[0]}', done.err)
        tally.refused += sum(done.code == 2 for done in ended)
        if not (any(done.code == 0 for done in ended) and all(done.code in (0, 2) for done in ended) and same()):
            tally.differs(f'two of {arguments[0]}: {[(done.code, done.err[-300:]) for done in ended]}')
    # Somebody looks at a run that is being trained.
    workdir = lab.new('watched')
    trainer = lab.start(lab.train(workdir))
    watchers = [lab.run(lab.evaluate(workdir)) for _ in range(2)]
    (trained,) = lab.finish([trainer])
    tally.runs += 3
    tally.faults += 1
    for done in (trained, *watchers):
        tally.prints('eval.py beside train.py', done.err)
    tally.refused += sum(done.code == 2 for done in watchers)
    different = compare_runs(workdir, lab.trained) if trained.code == 0 else trained.err[-500:]
    if different or any(done.code not in (0, 2) for done in watchers):
        tally.differs(f'eval.py beside train.py: {different} {[done.err[-300:] for done in watchers]}')


# Each with the undisturbed results that it compares with.
SCENES: dict[str, tuple[Callable[[Lab, Tally], None], Sequence[str]]] = {
    'training': (training, ('trained',)),
    'two processes': (training_of_two, ('trained_by_two',)),
    'preparing': (preparing, ('tokens',)),
    'evaluating': (evaluating, ('row',)),
    'sampling': (sampling, ('text',)),
    'sweeping': (sweeping, ('swept',)),
    'full disk': (full_disk, ('trained',)),
    'read-only': (read_only, ('trained',)),
    'clock': (clock, ('trained',)),
    'two programs': (two_programs, ('trained',)),
}
