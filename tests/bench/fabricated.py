"""Rows that no machine has measured, with figures that are easy to check."""

from __future__ import annotations

from typing import Any

from tlgc_mp.bench.scaling.rows import Record, make_row
from tlgc_mp.bench.settings import Case

DESCRIPTION: dict[str, Any] = {
    "machine": {"cpu": "Abacus 9", "cores": 2, "memory_bytes": 16 << 30, "system": "Linux"},
    "versions": {"torch": "2.0"},
    "commit": "abc123",
    "uncommitted_changes": False,
    "date": "2026-01-01T00:00:00+0000",
    "command": ["tlgc-mp", "bench", "scaling"],
}


def rank_result(seconds: list[float], busy: list[float], **changes: Any) -> dict[str, Any]:
    """What one rank measured."""
    return {
        "seconds": seconds,
        "busy_cpu_seconds": busy,
        "busy_device_seconds": None,
        "flops": 10**9,
        "collectives": {},
        "accounting": {"convolution, forward": 0.75, "optimizer": 0.25},
        "collective_seconds": 0.5,
        "collective_bytes": 2 * 10**6,
        "network_bytes": 10**6,
        "coarse_seconds": 0.25,
        "peak_memory_bytes": 5 * 10**6,
        "parameter_bytes": 10**6,
        "gradient_bytes": 2 * 10**6,
        "optimizer_bytes": 3 * 10**6,
        "activation_bytes": 4 * 10**6,
        **changes,
    }


def row(strategy: str, width: int, ranks: int, seconds: float, busy: float, **record: Any) -> dict[str, Any]:
    """The row of a case whose every step took ``seconds``, and every rank ``busy`` CPU seconds of them."""
    case = Case(strategy, 28, width, ranks if strategy.startswith("gc") else 1, ranks, 8)
    measured = [rank_result([seconds], [busy]) for _ in range(ranks)]
    return make_row(Record(case, True, measurements=[(0, measured)], **record), "fp32", 2e9, cores=2)


def table_2_rows() -> list[dict[str, Any]]:
    """gc-2l at 2 and 4 ranks and naive-mp at 2, at the paper's widths."""
    return [
        row(strategy, width, ranks, width * seconds, width * busy)
        for width in (40, 60, 80)
        for strategy, ranks, seconds, busy in (
            ("gc-2l", 2, 1.0 - width / 800, 0.9),
            ("gc-2l", 4, 0.5, 0.25),
            ("naive-mp", 2, 3.6, 1.8),
        )
    ]
