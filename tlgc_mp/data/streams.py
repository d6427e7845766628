"""Random streams named by what they are for, the same in every process and on every machine."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream_seed(*key: int | str) -> int:
    """A 64-bit seed for the stream named ``key``, such as ``(seed, "order", epoch)``.

    Hashed, so that neighbouring keys give unrelated streams; Python's own ``hash`` of a string differs from
    process to process.
    """
    name = "/".join(str(part) for part in key)
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def stream(*key: int | str) -> torch.Generator:
    """A CPU generator at the start of the stream named ``key``."""
    return torch.Generator().manual_seed(stream_seed(*key))


@contextmanager
def global_stream(*key: int | str) -> Iterator[None]:
    """Inside, torch's global CPU generator draws from the stream named ``key``; after, it is as it was before.

    For code that takes no generator, as torchvision's transforms. ``torch.manual_seed`` would not do: it
    reseeds the accelerators too, and dropout draws from those.
    """
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(stream_seed(*key))
    try:
        yield
    finally:
        torch.set_rng_state(before)
