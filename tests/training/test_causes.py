"""What an exception is told as, with which status, and whether it may be another rank's end seen from here."""

from __future__ import annotations

import errno

import pytest
import torch
import torch.distributed as dist

from tlgc_mp.errors import UsageError
from tlgc_mp.resilience.faults import Cause, cause_of
from tlgc_mp.training.finite import NonFiniteError, check_weights

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"
TAKEN = (
    "The server socket has failed to listen on any local network address. port: 4242, useIpv6: false, code: -98, name: "
)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UsageError("--data-dir: no"), Cause("--data-dir: no", status=2, traced=False, shared=True)),
        (NonFiniteError("the loss is nan"), Cause("the loss is nan", traced=False, shared=True)),
        (
            OSError(errno.ENOSPC, "No space left on device", "run/metrics.jsonl"),
            Cause("a file cannot be written: No space left on device: run/metrics.jsonl", traced=False),
        ),
        (OSError(errno.EFBIG, "File too large"), Cause("a file cannot be written: File too large", traced=False)),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), Cause("FileNotFoundError: [Errno 2] No such file: 'x'")),
        (MemoryError(), Cause("out of memory")),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), Cause("out of memory: [Errno 12] Cannot allocate memory")),
        (torch.OutOfMemoryError("CUDA out of memory."), Cause("out of memory: CUDA out of memory.")),
        (RuntimeError("shape '[2]' is invalid"), Cause("RuntimeError: shape '[2]' is invalid")),
        (
            RuntimeError("DataLoader worker (pid(s) 8211) exited unexpectedly"),
            Cause("data worker process 8211 has died", traced=False),
        ),
        (
            RuntimeError("DataLoader worker (pid 8211) is killed by signal: Killed. "),
            Cause("data worker process 8211 has died", traced=False),
        ),
        (RuntimeError("first\n  second"), Cause("RuntimeError: first second")),
        (RuntimeError(GLOO), Cause(f"RuntimeError: {GLOO}", echo=True)),
        (dist.DistNetworkError("recv failed"), Cause("DistNetworkError: recv failed", echo=True)),
        (ConnectionResetError(), Cause("ConnectionResetError", echo=True)),
        (ValueError("gloo"), Cause("ValueError: gloo")),
        (
            dist.DistNetworkError(f"{TAKEN}EADDRINUSE, message: address already in use"),
            Cause(
                "port 4242, where the ranks are to meet, is taken by another process; choose another (MASTER_PORT, or "
                "the launcher's --master_port)",
                traced=False,
            ),
        ),
    ],
)
def test_cause(error: BaseException, cause: Cause) -> None:
    assert cause_of(error) == cause


def test_long_messages_are_cut() -> None:
    assert len(cause_of(RuntimeError("x" * 10_000)).text) < 400


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weight_that_is_not_finite(value: float) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    check_weights(model, epoch=0, step=7)
    with torch.no_grad():
        model[1].weight[0, 1] = value
    with pytest.raises(NonFiniteError, match=r"the weights 1.weight are not finite in epoch 1 after step 7"):
        check_weights(model, epoch=0, step=7)
