"""The benchmark as a whole: its rounds, its files, and what it says of what fails. Never its times."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.bench import fabricated
from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.scaling import capacity
from tlgc_mp.bench.settings import STRATEGIES, Steps
from tlgc_mp.cli.main import main
from tlgc_mp.models import create_model
from tlgc_mp.parallel.plan import parameter_counts

POSITIVE = (
    "median_step_seconds",
    "images_per_second",
    "busy_cpu_seconds",
    "flops_per_rank",
    "achieved_flops_per_second",
    "best_flops_per_second",
    "achieved_share",
    "activation_bytes",
    "parameter_bytes",
    "gradient_bytes",
    "optimizer_bytes",
    "peak_memory_bytes",
    "hours_for_200_epochs",
)


def _rows(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "scaling.json").read_text())


@pytest.mark.timeout(280)
@pytest.mark.usefixtures("forked_ranks")
def test_every_strategy_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--quick", "--widths", "1", "--depth", "10", "--batch-sizes", "4", "--groups", "2", "--micro-batches=2"]
    two_ranks = [name for name in STRATEGIES if name != "gc-2l-dense"]
    one_rank = ["gc-2l", "gc-2l-dense", "naive-mp"]
    strategies = [*two_ranks, *(f"{name}@1" for name in one_rank)]
    status = main(["bench", "scaling", *flags, "--output", str(tmp_path), "--strategies", *strategies])
    said = capsys.readouterr().out
    assert status == 0, said
    assert said.count("s a step") == len(strategies)
    rows = _rows(tmp_path)
    assert [(row["strategy"], row["tp"]) for row in rows] == [
        *((name, 2) for name in two_ranks),
        *((name, 1) for name in one_rank),
    ]
    for row in rows:
        assert row["error"] is None and row["note"] is None
        assert (row["width"], row["depth"], row["batch_size"], row["dtype"]) == (1, 10, 4, "fp32")
        assert row["groups"] == (1 if STRATEGIES[row["strategy"]] == "sc" else 2)
        for key in POSITIVE:
            assert row[key] > 0, f"{key} of {row['strategy']}"
        assert [(sample["round"], sample["step"]) for sample in row["samples"]] == [(0, 0)]
        assert len(row["samples"][0]["busy_cpu_seconds"]) == row["tp"]
        assert (row["coarse_seconds"] > 0) == (STRATEGIES[row["strategy"]] == "gc-2l" and row["tp"] == 2)
        assert (row["collective_bytes"] > 0) == (row["tp"] == 2)
        assert row["collective_seconds"] > 0 or row["tp"] == 1
        for kind in ("convolution, forward", "convolution, backward", "BatchNorm", "optimizer"):
            assert row["accounting"][kind] > 0, f"{kind} of {row['strategy']}"
        assert row["peak_memory_bytes"] > 3 * row["parameter_bytes"]

    ours, alone = rows[0], rows[len(two_ranks)]
    per_rank = 4 * parameter_counts(create_model("wrn-10-1", groups=2, device="meta"), 2)["per_rank"]
    assert ours["parameter_bytes"] == ours["gradient_bytes"] == ours["optimizer_bytes"] == per_rank
    # Two ranks do together what one does.
    assert 2 * ours["flops_per_rank"] == alone["flops_per_rank"]
    assert json.loads((tmp_path / "run.json").read_text())["machine"]["cores"] >= 1
    assert "| 1 | zero3 |" in (tmp_path / "scaling.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "run.json",
        "scaling.json",
        "scaling.md",
        "scaling.png",
        "scaling.svg",
    ]


@pytest.mark.timeout(200)
@pytest.mark.usefixtures("forked_ranks")
def test_activation_checkpointing_keeps_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure, core = launch.measure, Measurements({}, None)
    monkeypatch.setattr(
        launch, "measure", lambda request, *rest: (measure if isinstance(request, Steps) else core)(request, *rest)
    )
    flags = ["--quick", "--widths", "1", "--depth", "22", "--batch-sizes", "4"]
    flags += ["--strategies", "gc-2l", "channel-parallel"]
    rows = []
    for folder, more in (("without", []), ("with", ["--activation-checkpointing"])):
        assert main(["bench", "scaling", *flags, *more, "--output", str(tmp_path / folder)]) == 0
        rows.append(_rows(tmp_path / folder))
    for plain, checkpointed in zip(*rows, strict=True):
        assert (plain["activation_checkpointing"], checkpointed["activation_checkpointing"]) == (False, True)
        assert 0 < checkpointed["activation_bytes"] < 0.7 * plain["activation_bytes"]
        if plain["strategy"] == "gc-2l":
            gathers = [row["collectives"]["all_gather"]["calls"] for row in (plain, checkpointed)]
            assert gathers[1] == 2 * gathers[0]
        else:
            sends = [row["collectives"]["send"]["calls"] for row in (plain, checkpointed)]
            assert sends[1] / sends[0] == pytest.approx(1.5, rel=0.1), "gathers twice, passes gradients back once"


class Measurements:
    """Stands in for :func:`launch.measure`: answers at once, and remembers what it was asked."""

    def __init__(self, answers: dict[tuple[str, int], launch.Outcome], device_memory: int | None) -> None:
        self.answers = answers
        self.asked: list[tuple[str, int]] = []
        self.on: list[tuple[int, list[str], str | None]] = []
        self.momentum: set[bool] = set()
        self.device_memory = device_memory

    def __call__(
        self, request: launch.Request, ranks: int, time_limit: float, places: Any, shared_folder: str | None
    ) -> launch.Outcome:
        key = (request.strategy, request.micro_batches) if isinstance(request, Steps) else ("core-rate", 1)
        self.asked.append(key)
        self.on.append((ranks, [place.address for place in places], shared_folder))
        if key[0] == "core-rate":
            name = None if self.device_memory is None else "Abacus X"
            rate = {"best_flops_per_second": 2e9, "device": name, "device_memory_bytes": self.device_memory}
            return launch.Outcome([rate] * ranks)
        assert isinstance(request, Steps)
        self.momentum.add(request.momentum)
        seconds = 1.0 / key[1] if key[1] < 8 else 9.0
        return self.answers.get(key) or launch.Outcome([fabricated.rank_result([seconds], [seconds])] * ranks)


def _run(
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    *flags: str,
    memory: float = 1e12,
    device_memory: int | None = None,
    answers: dict[tuple[str, int], launch.Outcome] | None = None,
) -> tuple[int, Measurements]:
    measurements = Measurements(answers or {}, device_memory)
    monkeypatch.setattr(launch, "measure", measurements)
    monkeypatch.setattr(capacity, "available_bytes", lambda: int(memory))
    return main(["bench", "scaling", "--output", str(folder), *flags]), measurements


def test_rounds_take_turns_and_keep_the_best_number_of_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--widths", "10", "--strategies", "gc-2l", "naive-mp", "pipeline", "--rounds", "2"]
    status, measurements = _run(monkeypatch, tmp_path, *flags)
    first = [("core-rate", 1), ("gc-2l", 1), ("naive-mp", 1)]
    assert status == 0
    assert measurements.asked == [*first, ("pipeline", 2), ("pipeline", 4), ("pipeline", 8), *first, ("pipeline", 4)]
    pipeline = _rows(tmp_path)[2]
    assert pipeline["micro_batches"] == 4
    assert pipeline["micro_batch_seconds"] == {"2": 0.5, "4": 0.25, "8": 9.0}
    assert [(sample["round"], sample["seconds"]) for sample in pipeline["samples"]] == [(0, 0.25), (1, 0.25)]


def test_hosts_share_the_ranks_and_have_cores_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlgc_mp.host.usable_cores", lambda: 1)
    flags = ["--widths", "10", "--strategies", "gc-2l@4", "--hosts", "one", "two", "--rounds", "1"]
    status, measurements = _run(monkeypatch, tmp_path, *flags)
    assert status == 0
    assert measurements.on == [(2, ["one", "two"], str(tmp_path)), (4, ["one", "two"], str(tmp_path))]


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_a_failure_is_in_the_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out_of_memory: bool
) -> None:
    failure = launch.Outcome(error="rank 1: no", out_of_memory=out_of_memory)
    flags = ["--widths", "10", "--strategies", "gc", "zero3", "naive-mp", "--rounds", "2"]
    status, measurements = _run(monkeypatch, tmp_path, *flags, answers={("zero3", 1): failure})
    assert status == (0 if out_of_memory else 1)
    assert measurements.asked.count(("zero3", 1)) == 1 and measurements.asked.count(("naive-mp", 1)) == 2
    assert [row["error"] for row in _rows(tmp_path)] == [None, "rank 1: no", None]
    assert "zero3, w=10, P=2: rank 1: no" in (tmp_path / "scaling.md").read_text()


def test_one_number_of_micro_batches_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failure = launch.Outcome(error="rank 0: no", out_of_memory=True)
    flags = ["--widths", "10", "--strategies", "pipeline", "--rounds", "1"]
    status, _ = _run(monkeypatch, tmp_path, *flags, answers={("pipeline", 4): failure})
    assert status == 0 and _rows(tmp_path)[0]["micro_batches"] == 2


@pytest.mark.parametrize(("memory", "device_memory"), [(24e9, None), (1e9, 12_000_000_000)], ids=["cpu", "devices"])
def test_where_the_dense_network_does_not_fit_all_go_without_momentum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: float, device_memory: int | None
) -> None:
    flags = ["--widths", "80", "--strategies", "gc-2l", "naive-mp", "zero3", "--rounds", "1"]
    status, measurements = _run(monkeypatch, tmp_path, *flags, memory=memory, device_memory=device_memory)
    assert status == 0 and measurements.momentum == {False}
    ours, naive, zero3 = _rows(tmp_path)
    assert "gradient" in naive["note"] and "gradient" not in ours["note"]
    for row in (ours, naive):
        assert row["momentum"] == 0.0 and row["median_step_seconds"] > 0
        assert "without momentum" in row["note"] and "w=80" in row["note"] and "24 GB are free" in row["note"]
    assert zero3["median_step_seconds"] is None and "does not fit" in zero3["error"]
    assert ("zero3", 1) not in measurements.asked


def test_all_cases_of_a_width_keep_momentum_or_none_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is free differs from one look to the next."""
    free = iter([24e9])
    measurements = Measurements({}, None)
    monkeypatch.setattr(launch, "measure", measurements)
    monkeypatch.setattr(capacity, "available_bytes", lambda: int(next(free, 1e12)))
    flags = ["--widths", "80", "--strategies", "gc-2l", "gc", "naive-mp", "--rounds", "1"]
    assert main(["bench", "scaling", "--output", str(tmp_path), *flags]) == 0
    assert measurements.momentum == {False}


def test_momentum_stays_where_no_dense_network_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--widths", "80", "--strategies", "gc-2l", "--rounds", "1"]
    _, measurements = _run(monkeypatch, tmp_path, *flags, memory=24e9)
    assert measurements.momentum == {True}
    _, measurements = _run(monkeypatch, tmp_path, *flags, "--no-momentum", memory=24e9)
    assert measurements.momentum == {False} and _rows(tmp_path)[0]["momentum"] == 0.0
