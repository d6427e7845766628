"""Reading ahead in other processes changes nothing but the speed."""

import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver

import pytest
import torch

from tlgc_mp.data import EvaluationBatches, TrainingBatches, load_datasets
from tlgc_mp.data.loaders import started_workers
from tlgc_mp.errors import UsageError


def test_batches_do_not_depend_on_the_workers_and_the_workers_stay() -> None:
    train = load_datasets("digits", None, seed=0).train
    here, elsewhere = (
        TrainingBatches(train, batch_size=64, seed=0, rank=1, replicas=2, num_workers=workers) for workers in (0, 2)
    )
    state = torch.get_rng_state()
    workers = None
    # The second epoch is left after one batch; the third must not be given what was read ahead for it.
    for epoch, start, stop in ((0, 0, None), (1, 0, 1), (2, 3, None)):
        seen = list(itertools.islice(elsewhere.epoch(epoch, start), stop))
        expected = list(itertools.islice(here.epoch(epoch, start), stop))
        assert len(seen) == len(expected) > 0
        for (images, labels), (expected_images, expected_labels) in zip(seen, expected, strict=True):
            assert torch.equal(images, expected_images) and torch.equal(labels, expected_labels)
            assert images.is_contiguous(memory_format=torch.channels_last)
        alive = {process.pid for process in multiprocessing.active_children()}
        assert len(alive) >= 2 and workers in (None, alive)
        workers = alive
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_reaches_the_caller_as_one_line(workers: int, make_folders) -> None:
    root = make_folders({"train/cat": 1, "train/dog": 1, "test/cat": 2, "test/dog": 1})
    path = root / "test" / "cat" / "1.png"
    path.write_bytes(b"not an image")
    test = load_datasets("imagefolder", str(root), seed=0).test
    with pytest.raises(UsageError) as caught:
        list(EvaluationBatches(test, batch_size=2, rank=0, replicas=1, num_workers=workers))
    message = str(caught.value)
    assert message.startswith(f"every image must be one that can be read, got '{path}' (") and "\n" not in message


def _signalled(own_server: bool) -> tuple[int, int]:
    """How many batches come, and how many there are, where the worker and the fork server are asked to stop."""
    if not own_server:  # other code has started it
        other = multiprocessing.get_context("forkserver").Process(target=int)
        other.start()
        other.join()
    batches = TrainingBatches(
        load_datasets("digits", None, seed=0).train, batch_size=64, seed=0, rank=0, replicas=1, num_workers=1
    )
    stream = batches.epoch(0)
    next(stream)
    worker = started_workers[-1]
    server = forkserver._forkserver._forkserver_pid
    for pid in (worker.pid, *([server] if own_server else [])):
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            os.kill(pid, number)
    time.sleep(0.2)
    came = 1 + len(list(stream))
    assert worker.is_alive() and signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()
    assert os.waitpid(server, os.WNOHANG) == (0, 0)
    worker.terminate()
    worker.join(10)
    assert not worker.is_alive()
    return came, len(batches)


@pytest.mark.parametrize("own_server", [True, False])
def test_workers_do_not_stop_with_the_group_and_end_when_told_to(own_server: bool) -> None:
    """Ctrl-C, mpirun and Slurm signal all processes of a group, the fork server that workers come from too."""
    code = f"from tests.data.test_worker_processes import _signalled; print(*_signalled({own_server}))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=110)
    assert ended.returncode == 0, ended.stderr
    came, batches = map(int, ended.stdout.split())
    assert came == batches
