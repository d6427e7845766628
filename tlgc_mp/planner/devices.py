"""What a device can do and how devices are joined: from published rates, or measured by ``tlgc-mp plan --calibrate``.

Loads no torch.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict, dataclass, fields

from tlgc_mp.errors import UsageError, is_count, one_of, shown

SHARE_OF_PEAK = 0.5
"""What a training step is taken to reach of the arithmetic and the bandwidth that is published, where nothing was
measured."""

CONTEXT = 0.6 * 2**30
"""Bytes that a process takes of an accelerator before it holds a tensor."""

DTYPES = ("fp32", "bf16")


@dataclass(frozen=True)
class Device:
    """One device, as a rank has it.

    Attributes:
        memory: bytes that a rank may use.
        convolution, product: FLOP/s of convolutions and of matrix products that a step reaches, by type.
        bandwidth: bytes/s of its memory that a step reaches.
        overhead: seconds that an operator takes beside that.
        link: bytes/s that a rank sends to another on its host.
        latency: seconds until a message arrives there.
        host: bytes/s between the device and its host's memory.
        accelerator: whether it is one; else it is a core of a CPU.
        fixed: bytes that a process takes before it holds a tensor.
        zero: bytes that it takes beside under ZeRO, which loads more code.
        compiled: bytes that it keeps for each convolution of another shape, forward or backward, that it has computed.
        source: where the figures are from.
    """

    name: str
    memory: float
    convolution: dict[str, float]
    product: dict[str, float]
    bandwidth: float
    overhead: float
    link: float
    latency: float
    host: float
    accelerator: bool
    fixed: float
    zero: float
    compiled: float
    source: str


def _of_peak_rates(
    name: str, gib: float, fp32: float, tensor_fp32: float, bf16: float, bandwidth: float, link: float, source: str
) -> Device:
    """Of peak rates in TFLOP/s and GB/s; convolutions of float32 run in TF32 where there is that."""
    return Device(
        name=name,
        memory=gib * 2**30,
        convolution={"fp32": SHARE_OF_PEAK * tensor_fp32 * 1e12, "bf16": SHARE_OF_PEAK * bf16 * 1e12},
        product={"fp32": SHARE_OF_PEAK * fp32 * 1e12, "bf16": SHARE_OF_PEAK * bf16 * 1e12},
        bandwidth=SHARE_OF_PEAK * bandwidth * 1e9,
        overhead=5e-6,
        link=SHARE_OF_PEAK * link * 1e9,
        latency=10e-6,
        host=SHARE_OF_PEAK * 32e9,
        accelerator=True,
        fixed=CONTEXT,
        zero=0.0,
        compiled=0.0,
        source=f"half of {source}",
    )


DEVICES = {
    device.name: device
    for device in (
        _of_peak_rates(
            "h200", 139, 67, 494.5, 989, 4800, 450, "peak rates published for NVIDIA H200 SXM, without sparsity"
        ),
        _of_peak_rates(
            "h100", 79, 67, 494.5, 989, 3350, 450, "peak rates published for NVIDIA H100 SXM, without sparsity"
        ),
        _of_peak_rates(
            "a100-80", 79, 19.5, 156, 312, 2039, 300, "peak rates published for NVIDIA A100 80GB SXM, without sparsity"
        ),
        _of_peak_rates(
            "a100-40", 39, 19.5, 156, 312, 1555, 300, "peak rates published for NVIDIA A100 40GB SXM, without sparsity"
        ),
        _of_peak_rates(
            "v100",
            31,
            15.7,
            15.7,
            15.7,
            900,
            150,
            "peak rates published for NVIDIA V100 32GB SXM2, which has no bfloat16",
        ),
        _of_peak_rates(
            "rtx-4090", 23.5, 82.6, 82.6, 165, 1008, 32, "peak rates published for NVIDIA RTX 4090; PCIe 4.0"
        ),
        _of_peak_rates("rtx-3090", 23.5, 35.6, 35.6, 71, 936, 32, "peak rates published for NVIDIA RTX 3090; PCIe 4.0"),
        _of_peak_rates(
            "titan-rtx", 23.5, 16.3, 16.3, 16.3, 672, 16, "peak rates published for NVIDIA TITAN RTX; PCIe 3.0"
        ),
    )
}


@dataclass(frozen=True)
class Network:
    """How ranks are joined.

    Attributes:
        hosts: how many.
        ranks: of a host.
        bandwidth: bytes/s that a host sends to others.
        latency: seconds until a message arrives at another host.
    """

    hosts: int
    ranks: int
    bandwidth: float
    latency: float = 30e-6


def find_device(name: str, calibrated: str | None = None) -> Device:
    """The device of that name, or the one that the file ``calibrated`` describes.

    Raises:
        UsageError: there is none, or the file is no such file.
    """
    if calibrated is not None:
        return _read(calibrated)
    if name not in DEVICES:
        raise UsageError(
            f"--gpu must be {one_of(DEVICES)}, got {name!r}; or measure the device at hand with plan --calibrate FILE"
        )
    return DEVICES[name]


def _read(path: str) -> Device:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except OSError as error:
        raise UsageError(f"--calibrated must be a file, got {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError):
        found = None
    names = {field.name for field in fields(Device)}
    if not isinstance(found, dict) or set(found.get("device", {})) != names:
        raise UsageError(
            f"--calibrated must be a file of plan --calibrate, got {path!r}, which is another; write it again"
        )
    device = Device(**found["device"])
    rates = (device.bandwidth, device.link, device.host, *device.convolution.values(), *device.product.values())
    if not all(isinstance(rate, int | float) and 0 < rate < math.inf for rate in (*rates, device.memory)):
        raise UsageError(f"--calibrated must hold positive rates, got {path!r} without; write it anew")
    return device


def to_dict(device: Device) -> dict[str, object]:
    """As JSON holds it, and ``--calibrated`` reads it in ``{"device": ...}``."""
    return asdict(device)


_SIZE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)(MB|GB|TB|MiB|GiB|TiB)")
_SIZES = {"MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_RATE = re.compile(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([MG])bit", re.IGNORECASE)
_HOSTS = re.compile(r"([0-9]{1,6})x([0-9]{1,6})")
LARGEST_RANKS = 4096


def read_memory(text: str) -> float:
    """``"24GiB"`` -> bytes.

    Raises:
        UsageError: it is no size.
    """
    found = _SIZE.fullmatch(text)
    if found is None or not float(found[1]):
        raise UsageError(f"--memory must be a size above 0, got {text!r}; use e.g. 24GiB or 80GB")
    return float(found[1]) * _SIZES[found[2]]


def read_bandwidth(text: str) -> float:
    """``"100Gbit"`` -> bytes/s.

    Raises:
        UsageError: it is no bandwidth.
    """
    found = _RATE.fullmatch(text)
    if found is None or not float(found[1]):
        raise UsageError(f"--network must be a bandwidth above 0, got {text!r}; use e.g. 100Gbit")
    return float(found[1]) * {"m": 1e6, "g": 1e9}[found[2].lower()] / 8


def read_hosts(text: str | None, ranks: int | None, bandwidth: float) -> Network:
    """``"8x4"``, hosts by ranks of each, for ``ranks`` in all; without it as many hosts of 8 as it takes.

    Raises:
        UsageError: it is none, or does not make as many ranks.
    """
    if ranks is not None and (not is_count(ranks) or ranks > LARGEST_RANKS):
        raise UsageError(f"--ranks must be 1 to {LARGEST_RANKS}, got {shown(ranks)}; use e.g. 8")
    if text is None:
        ranks = 1 if ranks is None else ranks
        local = math.gcd(ranks, 8) if ranks > 8 else ranks
        return Network(ranks // local, local, bandwidth)
    found = _HOSTS.fullmatch(text)
    if found is None or not int(found[1]) or not int(found[2]):
        raise UsageError(f"--hosts must be HOSTSxRANKS, got {text!r}; use e.g. 8x8 for 8 hosts of 8 ranks")
    hosts, local = int(found[1]), int(found[2])
    if hosts * local > LARGEST_RANKS or ranks not in (None, hosts * local):
        raise UsageError(
            f"--hosts must make the {LARGEST_RANKS if ranks is None else ranks} ranks "
            f"{'at most' if ranks is None else 'of --ranks'}, got {text!r}, which makes {hosts * local}; "
            "leave out one of them"
        )
    return Network(hosts, local, bandwidth)
