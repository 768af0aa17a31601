"""A sweep on a Ray cluster of two nodes, both on this machine, one of which dies in the middle."""

import contextlib
import os
import signal

import pytest

from gau.training import workdir as files
from tests.experiments.test_runner import losses, run, start, starts, wait_for, wait_for_rows

# Ray takes what is slow to start or to answer for dead, and a raylet ends when its agent has not answered after 30 s:
# too little where all cores are busy. A node that was killed refuses connections, which none of these delays.
PATIENCE = {
    'RAY_agent_register_timeout_ms': '300000',
    'RAY_worker_register_timeout_seconds': '300',
    'RAY_health_check_timeout_ms': '60000',
    'RAY_gcs_server_request_timeout_seconds': '300',
}


@pytest.fixture
def start_cluster(monkeypatch):
    """Yields a function that starts a Ray cluster on this machine, of one node with so many CPUs."""
    cluster_utils = pytest.importorskip('ray.cluster_utils')
    for name, value in PATIENCE.items():
        monkeypatch.setenv(name, value)
    # What is started on a node stands still at step 3 until there is a file.
    monkeypatch.setenv('FAKE_HOLD', '3')
    with contextlib.ExitStack() as stack:

        def start_cluster(num_cpus):
            head = {'num_cpus': num_cpus, 'include_dashboard': False}
            cluster = cluster_utils.Cluster(initialize_head=True, head_node_args=head)
            stack.callback(cluster.shutdown)
            return cluster

        yield start_cluster


def pids(directory):
    return {path.parent.name: int(path.read_text()) for path in directory.glob('*/.pid')}


def steps(directory):
    return {
        path.parent.name: [row['step'] for row in files.read_metrics(path)]
        for path in directory.glob('*/metrics.jsonl')
    }


@pytest.mark.slow
def test_a_node_that_dies_loses_nothing_and_nothing_runs_twice(tmp_path, start_cluster):
    cluster = start_cluster(2)
    other = cluster.add_node(num_cpus=2)
    cluster.wait_for_nodes()
    sweep = start(
        *('--sweep=chunk_size,seed:4', f'--workdir={tmp_path}', '--executor=ray', '--per_device=2'),
        RAY_ADDRESS=cluster.address,
    )
    # Two runs a node; four wait.
    wait_for_rows(tmp_path, 3, runs=4)
    first = starts(tmp_path)
    assert len(set(first)) == 4
    cluster.remove_node(other, allow_graceful=False)
    # Its runs save and end, and wait with the others until the node that is left has room.
    wait_for(lambda: sum('saved at step 3' in log.read_text() for log in tmp_path.glob('*.log')) == 2)
    (tmp_path / 'release').touch()
    out, err = sweep.communicate(timeout=600)
    print(out)
    assert sweep.returncode == 0, out + err
    assert len(losses(tmp_path)) == 8
    # Every step of every run once, and only the two runs of the dead node were started again.
    assert set(map(tuple, steps(tmp_path).values())) == {tuple(range(1, 13))}
    assert sorted(starts(tmp_path).count(name) for name in losses(tmp_path)) == [1] * 6 + [2] * 2


@pytest.mark.slow
def test_failures_and_signals_on_a_cluster(tmp_path, start_cluster):
    address = {'RAY_ADDRESS': start_cluster(4).address}
    failing = tmp_path / 'failing'
    failing.mkdir()
    arguments = ('--sweep=rate:0.001:13.0:7.0:5.0', f'--workdir={failing}', '--executor=ray', '--per_device=4')
    sweep = start(*arguments, **address)
    wait_for_rows(failing, 3, runs=2)
    sweep.send_signal(signal.SIGTERM)
    out, err = sweep.communicate(timeout=600)
    print(out)
    assert sweep.returncode == 143, out + err
    assert out.count('stopped, saved at step 3') == 2
    (failing / 'release').touch()
    code, out, err = run(*arguments, **address)
    print(out)
    assert code == 1, out + err
    assert 'finished: 2 of 4 points' in out
    assert 'learning_rate_13 failed 3 times, exit code 1: RuntimeError: as it should' in out
    assert 'learning_rate_5 failed once, exit code 2: error: learning rate 5 is bad input' in out
    killed = tmp_path / 'killed'
    sweep = start('--sweep=chunk_size', f'--workdir={killed}', '--executor=ray', '--per_device=4', **address)
    wait_for_rows(killed, 3, runs=2)
    sweep.kill()
    sweep.communicate()
    wait_for(lambda: all('saved at step 3' in log.read_text() for log in killed.glob('*.log')))
    wait_for(lambda: not any(map(_alive, pids(killed).values())))


def _alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_an_address_where_nobody_listens_is_refused_at_once(tmp_path):
    pytest.importorskip('ray')
    arguments = ('--sweep=chunk_size', f'--workdir={tmp_path}/sweep', '--executor=ray')
    code, _, err = run(*arguments, RAY_ADDRESS='127.0.0.1:1')
    assert (code, err.count('\n')) == (2, 1), err
    assert 'no Ray cluster answers at RAY_ADDRESS=127.0.0.1:1' in err


def test_without_ray_it_says_what_to_install(tmp_path):
    arguments = ('--sweep=chunk_size', f'--workdir={tmp_path}/sweep', '--executor=ray')
    code, _, err = run(*arguments, PYTHONPATH=str(hide_ray(tmp_path)))
    assert (code, err.count('\n')) == (2, 1), err
    assert 'pip install -r requirements-ray.txt' in err


def hide_ray(directory):
    """Returns a directory of modules in which Ray is not there."""
    (directory / 'hidden').mkdir()
    (directory / 'hidden' / 'ray.py').write_text("raise ModuleNotFoundError('no ray')\n")
    return directory / 'hidden'
