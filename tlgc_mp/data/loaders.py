"""The batches that one data-parallel replica draws.

Which samples make a batch and how each is augmented follow from ``(seed, epoch, sample index)``: neither the
number of worker processes nor the rank that draws a sample changes it. All tensor-parallel ranks of a replica are
given the replica's ``rank`` and so draw the same batches.
"""

import os
import select
import signal
import threading
from collections.abc import Iterator
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.context import ForkServerContext, ForkServerProcess
from multiprocessing.popen_forkserver import Popen
from multiprocessing.process import BaseProcess
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from tlgc_mp.data.datasets import ImageDataset
from tlgc_mp.data.streams import global_stream, stream
from tlgc_mp.errors import UsageError, is_count, must_be

Request: TypeAlias = tuple[int, list[int]]  # the epoch, and the indices of the samples of one batch

_WORKER_TIMEOUT_SECONDS = 300
_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class TrainingBatches:
    """Shuffled, augmented batches of equal size, for one of ``replicas`` replicas.

    Global batch ``k`` of an epoch is ``replicas * batch_size`` samples of the epoch's order, of which replica
    ``rank`` takes the ``rank``-th consecutive part: runs with the same ``replicas * batch_size`` see the same global
    batches. The samples left over at an epoch's end are dropped. torch's global random state is left as it was.

    Args:
        dataset: its random augmentation, if any, must draw from torch's global CPU generator.
        batch_size: samples in one replica's batch.
        seed: of the order and of the augmentation.
        rank, replicas: the data-parallel rank and count.
        num_workers: processes that read ahead, kept from epoch to epoch; 0 reads in this process. They
            import the main module, so a script must start its work under ``if __name__ == "__main__":``.

    Raises:
        UsageError: an argument is out of range, or the data set is smaller than one global batch. While iterating:
            a sample cannot be read.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        seed: int,
        rank: int = 0,
        replicas: int = 1,
        num_workers: int = 0,
    ) -> None:
        samples = _check(dataset, batch_size, rank, replicas, num_workers)
        if not isinstance(seed, int):
            raise must_be("seed", "an int", seed)
        if samples < batch_size * replicas:
            raise UsageError(
                f"batch_size x replicas must be {samples} or less, the samples of the training set, got "
                f"{batch_size} x {replicas}"
            )
        self._sampler = _EpochSampler(samples, batch_size=batch_size, seed=seed, rank=rank, replicas=replicas)
        self._loader = _loader(_Reader(dataset, seed), self._sampler, num_workers)

    def __len__(self) -> int:
        """Batches an epoch."""
        return self._sampler.batches

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``start..len(self) - 1`` of an epoch: images B x 3 x H x W (channels_last), labels B (int64).

        The same sequence each time it is asked for. One at a time: do not read on in an epoch once another is begun.
        """
        if not is_count(epoch, 0):
            raise must_be("epoch", "0 or more", epoch)
        if not is_count(start, 0) or start > len(self):
            raise must_be("start", f"0 to {len(self)}, a batch of the epoch", start)
        self._sampler.epoch, self._sampler.start = epoch, start
        return _batches(iter(self._loader))


class EvaluationBatches:
    """Every sample of a data set once, in order, spread over ``replicas`` replicas.

    All replicas yield as many batches, all of ``batch_size`` samples, so that collective calls made for each batch
    match; where the samples run out, repeated ones of weight 0 fill up. Iterating yields images B x 3 x H x W
    (channels_last), labels B (int64) and weights B (float32, 1 or 0).

    Args:
        dataset, batch_size, rank, replicas, num_workers: as for :class:`TrainingBatches`.

    Raises:
        UsageError: an argument is out of range. While iterating: a sample cannot be read.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        *,
        batch_size: int,
        rank: int = 0,
        replicas: int = 1,
        num_workers: int = 0,
    ) -> None:
        samples = _check(dataset, batch_size, rank, replicas, num_workers)
        positions = torch.arange(-(-samples // (batch_size * replicas)) * batch_size * replicas)
        mine = positions.view(-1, replicas, batch_size)[:, rank]  # batches x B
        self._weights = (mine < samples).float()
        requests: list[Request] = [(0, batch) for batch in (mine % max(samples, 1)).tolist()]
        self._loader = _loader(_Reader(dataset, seed=0), requests, num_workers)

    def __len__(self) -> int:
        """Batches, the same on every replica."""
        return len(self._weights)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (images, labels), weights in zip(_batches(iter(self._loader)), self._weights, strict=True):
            yield images, labels, weights


class _EpochSampler(Sampler[Request]):
    """One replica's requests of the epoch that ``epoch`` and ``start`` are set to when iteration begins."""

    epoch = 0
    start = 0

    def __init__(self, samples: int, *, batch_size: int, seed: int, rank: int, replicas: int) -> None:
        self.samples, self.batch_size, self.seed = samples, batch_size, seed
        self.rank, self.replicas = rank, replicas
        self.batches = samples // (batch_size * replicas)

    def __iter__(self) -> Iterator[Request]:
        return self._requests(self.epoch, self.start)

    def _requests(self, epoch: int, start: int) -> Iterator[Request]:
        order = torch.randperm(self.samples, generator=stream(self.seed, "order", epoch))
        for batch in range(start, self.batches):
            first = (batch * self.replicas + self.rank) * self.batch_size
            yield epoch, order[first : first + self.batch_size].tolist()


class _Reader(Dataset[tuple[Tensor, Tensor] | UsageError]):
    """A data set whose items are whole batches, each sample drawn under its own random state.

    A UsageError is returned, not raised: DataLoader would put a worker's traceback in place of its message.
    """

    def __init__(self, dataset: ImageDataset, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, request: Request) -> tuple[Tensor, Tensor] | UsageError:
        epoch, indices = request
        images, labels = [], []
        try:
            for index in indices:
                with global_stream(self.seed, "sample", epoch, index):
                    image, label = self.dataset[index]
                images.append(image)
                labels.append(label)
        except UsageError as error:
            return error
        return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(labels)


def _loader(
    reader: _Reader, requests: Sampler[Request] | list[Request], num_workers: int
) -> DataLoader[tuple[Tensor, Tensor] | UsageError]:
    # A generator of the loader's own: it draws a seed for its workers, by default from the global state.
    own = torch.Generator()
    if num_workers == 0:
        return DataLoader(reader, batch_size=None, sampler=requests, generator=own)
    return DataLoader(
        reader,
        batch_size=None,
        sampler=requests,
        generator=own,
        num_workers=num_workers,
        persistent_workers=True,
        timeout=_WORKER_TIMEOUT_SECONDS,
        worker_init_fn=partial(_end_with, os.getpid()),
        # A plain fork copies locks that torch's, NCCL's or MPI's threads may hold at that moment, and a worker can
        # wait for one forever. The fork server is a fresh process without such threads.
        multiprocessing_context=_WorkerContext(),
    )


started_workers: list[BaseProcess] = []
"""The data worker processes that this process has started, in that order, dead ones too.

DataLoader waits for a batch as long as it may before it looks whether the worker that makes it lives.
"""


class _WorkerPopen(Popen):
    def terminate(self) -> None:
        self.kill()  # type: ignore[no-untyped-call]


class _Worker(ForkServerProcess):
    """A process that no signal stops but SIGKILL.

    Ctrl-C goes to every process of the terminal's group, and mpirun and Slurm signal groups too. A rank that is asked
    to stop still needs its workers, for the step or the save under way, and it ends them itself.
    """

    def start(self) -> None:
        resource_tracker.ensure_running()  # the fork server needs it, and starting it unblocks signals
        # The first worker starts the fork server. Signals that are blocked here are blocked there, and in the workers;
        # in this process they wait, or reach another thread.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
        try:
            super().start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        started_workers.append(self)

    @staticmethod
    def _Popen(process: BaseProcess) -> Popen:
        return _WorkerPopen(process)  # type: ignore[no-untyped-call]


class _WorkerContext(ForkServerContext):
    Process = _Worker


def _end_with(rank: int, worker: int) -> None:
    """Ends this worker process when the process ``rank`` does, killed ones too, and with no other signal.

    Its parent is the fork server, which lives as long as any worker: left alone, both would outlive the rank for good.
    Other code may have started the server, without blocking signals.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    threading.Thread(target=_wait_for_end, args=(rank,), daemon=True).start()


def _wait_for_end(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)
    select.select([descriptor], [], [])
    os._exit(1)


def _batches(items: Iterator[tuple[Tensor, Tensor] | UsageError]) -> Iterator[tuple[Tensor, Tensor]]:
    for item in items:
        if isinstance(item, UsageError):
            raise item
        images, labels = item
        yield images, labels


def _check(dataset: ImageDataset, batch_size: int, rank: int, replicas: int, num_workers: int) -> int:
    """The length of ``dataset``, where the arguments can work."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise must_be("dataset", "a Dataset with a length and items", type(dataset))
    if not is_count(batch_size):
        raise must_be("batch_size", "1 or more", batch_size)
    if not is_count(num_workers, 0):
        raise must_be("num_workers", "0 or more", num_workers)
    if not is_count(replicas):
        raise must_be("replicas", "1 or more", replicas)
    if not is_count(rank, 0) or rank >= replicas:
        raise must_be("rank", f"0 to {replicas - 1}, one of {replicas} replicas", rank)
    return len(dataset)
