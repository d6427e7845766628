"""Memory under ZeRO: what the stages promise, what the engine is found to hold of it, and how that is told."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.bench import fabricated
from tests.parallel.common import run_ranks_once
from tlgc_mp.bench.ranks import launch
from tlgc_mp.bench.zero import sweep as zero
from tlgc_mp.cli.main import main
from tlgc_mp.engine.memory import engine_memory
from tlgc_mp.models import create_model
from tlgc_mp.parallel import checksums
from tlgc_mp.parallel.plan import parameter_counts

RANKS, REPLICAS, MODEL, GROUPS = 2, 2, "wrn-10-2", 4
REQUEST = zero.ZeroMemory(MODEL, GROUPS, RANKS, batch_size=4)
CASES = [(0, zero.OWN), *((stage, name) for stage in (1, 2, 3) for name in (zero.OWN, zero.BOUNDED))]
TENTH = 0.1


def _all_storages() -> dict[int, torch.UntypedStorage]:
    """By address, of every tensor that Python can reach. As long as they are held, no address is used again."""
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor) and item.layout == torch.strided and not item.is_meta:
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage()
    return storages


def _unaccounted(stage: int) -> int:
    """Bytes of tensors that are new with an engine, after backward, and are neither held by it nor known here."""
    from tlgc_mp.bench.zero.rank import training_engine

    checksums.exact(torch.zeros(1))  # makes the table that they are weighted by, which a process has once
    gc.collect()
    before = _all_storages()
    engine, step = training_engine(REQUEST, {"stage": stage, **zero.bounds(4000)}, torch.device("cpu"))
    batch = 4 * 2 * 3 * 32 * 32 + 8 * 2  # images and labels
    known = batch + sum(buffer.nbytes for buffer in engine.module.buffers())
    found: list[int] = []

    def look() -> None:
        # Gloo's thread may still hold the tensor of a collective that has just ended, and lets go of it by itself.
        for _ in range(100):
            gc.collect()
            new = sum(storage.nbytes() for address, storage in _all_storages().items() if address not in before)
            found.append(new - sum(engine_memory(engine).values()) - known)
            if not found[-1]:
                break
            time.sleep(0.05)

    step()
    step(look)
    return found[-1]


def _measured() -> dict[str, Any]:
    """What a rank measures, and what it finds unaccounted for at each stage after backward."""
    from tlgc_mp.bench.zero.rank import measure_rank

    unaccounted = {stage: _unaccounted(stage) for stage in (1, 2, 3)}
    return {**measure_rank(REQUEST, torch.device("cpu")), "unaccounted": unaccounted}


def _rows() -> dict[tuple[int, str], zero.Row]:
    settings = zero.ZeroSettings(MODEL, GROUPS, RANKS, REPLICAS, 4, "", 60.0)
    rows = zero.make_rows(settings, run_ranks_once(RANKS * REPLICAS, _measured))
    return {(row["stage"], row["settings"]): row for row in rows}


def _largest_share() -> int:
    return max(p.numel() for p in create_model(MODEL, groups=GROUPS, device="meta").parameters()) // RANKS


def test_cases() -> None:
    rows = _rows()
    assert list(rows) == CASES
    share = parameter_counts(create_model(MODEL, groups=GROUPS, num_classes=10, device="meta"), RANKS)["per_rank"]
    assert {row["parameters"] for row in rows.values()} == {share}
    assert {row["zero_optimization"].get("reduce_bucket_size") for row in rows.values()} == {None, _largest_share()}


@pytest.mark.parametrize("case", CASES)
def test_optimizer_state_is_what_the_stage_promises(case: tuple[int, str]) -> None:
    row = _rows()[case]
    promised = 4 * row["parameters"] / (REPLICAS if case[0] else 1)
    for moment in ("in_backward", "after_backward", "at_step"):
        assert row[moment]["state_bytes"] == pytest.approx(promised, rel=TENTH)
        assert row[moment]["master_bytes"] == pytest.approx(promised if case[0] else 0, rel=TENTH)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_what_the_stage_promises(case: tuple[int, str]) -> None:
    row, (stage, name) = _rows()[case], case
    whole, part = 4 * row["parameters"], 4 * row["parameters"] / REPLICAS
    largest = 4 * _largest_share()
    after, step = row["after_backward"]["gradient_bytes"], row["at_step"]["gradient_bytes"]
    if stage == 0:
        assert after == step == whole
    elif stage < 3:
        assert step == pytest.approx(part, rel=TENTH)
        assert (1 - TENTH) * part < after < (1 + TENTH) * part + largest  # one parameter lies in both partitions
    else:
        assert after == pytest.approx(part, rel=TENTH)
        assert step < 2.05 * part if name == zero.OWN else step < part + 1.1 * largest  # a sub-group's copy
    if stage == 1:
        assert row["in_backward"]["gradient_bytes"] == pytest.approx(whole, rel=TENTH)
    if (stage, name) == (2, zero.BOUNDED):
        assert row["in_backward"]["gradient_bytes"] < 0.9 * whole + largest


@pytest.mark.parametrize("case", CASES)
def test_parameters_are_what_the_stage_promises(case: tuple[int, str]) -> None:
    row = _rows()[case]
    whole = 4 * row["parameters"]
    promised = whole / REPLICAS if case[0] == 3 else whole
    small = whole if case == (3, zero.OWN) else 0  # every parameter of this network is below the threshold
    assert row["after_backward"]["parameter_bytes"] == pytest.approx(promised + small, rel=TENTH)
    assert row["at_step"]["parameter_bytes"] == pytest.approx(promised, rel=TENTH)


@pytest.mark.parametrize("case", CASES)
def test_buckets_are_as_large_as_they_are_set(case: tuple[int, str]) -> None:
    row, (stage, name) = _rows()[case], case
    size = 0 if stage == 0 else 4 * (_largest_share() if name == zero.BOUNDED else 500_000_000)
    assert row["in_backward"]["bucket_bytes"] == size
    assert row["after_backward"]["bucket_bytes"] == (size if stage == 3 else 0)


def test_nothing_that_the_engine_holds_is_left_out() -> None:
    share = 4 * _rows()[0, zero.OWN]["parameters"]
    for rank in run_ranks_once(RANKS * REPLICAS, _measured):
        assert set(rank["unaccounted"]) == {1, 2, 3}
        for stage, unaccounted in rank["unaccounted"].items():
            assert abs(unaccounted) < 0.01 * share, f"stage {stage}: {unaccounted} bytes of {share}"


@pytest.mark.parametrize(("stage", "megabytes"), [(0, (12, 12, 12)), (1, (12, 12, 3)), (2, (12, 3, 3)), (3, (3, 3, 3))])
def test_promise(stage: int, megabytes: tuple[int, int, int]) -> None:
    assert tuple(zero.promise(stage, 3_000_000, 4).values()) == tuple(1e6 * mb for mb in megabytes)


def _answer(request: zero.ZeroMemory, ranks: int, time_limit: float) -> launch.Outcome:
    assert (ranks, time_limit) == (6, 60.0) and request.model == "wrn-16-4"
    kinds = ("bucket_bytes", "parameter_bytes", "state_bytes", "master_bytes", "gradient_bytes", "other_bytes")
    moments = {name: dict.fromkeys(kinds, 5_000_000) for name in ("in_backward", "after_backward", "at_step")}
    case = {"stage": 2, "settings": zero.OWN, "zero_optimization": {}, "parameters": 3_000_000, **moments}
    more = {**case, "after_backward": dict.fromkeys(kinds, 7_250_000)}
    return launch.Outcome([{"cases": [more if rank == 1 else case]} for rank in range(ranks)])


def test_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(launch, "measure", _answer)
    monkeypatch.setattr(zero, "describe_run", lambda: fabricated.DESCRIPTION)
    flags = ["--quick", "--tp", "2", "--replicas", "3", "--time-limit", "60", "--output", str(tmp_path)]
    assert main(["bench", "zero", *flags]) == 0
    assert "ZeRO 2  DeepSpeed's own  MB after backward: parameter 7.25, gradient 7.25" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["zero.json", "zero.md"]
    found = json.loads((tmp_path / "zero.json").read_text())
    assert found["run"] == fabricated.DESCRIPTION
    assert found["rows"][0]["promised"] == {"parameter_bytes": 12e6, "gradient_bytes": 4e6, "state_bytes": 4e6}
    assert (
        "| 2 | DeepSpeed's own | 12.00 | 7.25 | 4.00 | 7.25 | 4.00 | 7.25 | 5.00 |"
        in (tmp_path / "zero.md").read_text()
    )


def test_a_failed_measurement_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launch, "measure", lambda *_: launch.Outcome(error="rank 1: killed by SIGKILL"))
    assert main(["bench", "zero", "--output", str(tmp_path)]) == 1
    assert "rank 1: killed by SIGKILL" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--tp", "0"], "--tp must be 1 to 256 ranks, got 0"),
        (["--replicas=-1"], "--replicas must be 1 to 256 ranks, got -1"),
        (["--replicas", "9" * 400], "--replicas must be 1 to 256 ranks, got 999"),
        (["--replicas", "129"], "--tp x --replicas must be 1 to 256 ranks, got 258"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--tp", "3"], "3"),
        (["--batch-size", "3"], "--batch-size must be a multiple of 2, the replicas, got 3"),
        (["--model", "resnet"], "resnet"),
        (["--time-limit", "nan"], "--time-limit must be a positive number of seconds, got nan"),
    ],
)
def test_mistake_is_told_in_one_line(
    flags: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "zero", *flags, "--output", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("tlgc-mp: error: ") and said.count("\n") == 1 and part in said


def test_mistakes_are_found_without_torch() -> None:
    code = (
        "import sys; from tlgc_mp.cli.main import main\n"
        "print(main(['bench', 'zero', '--tp', '3']), [name for name in ('torch', 'deepspeed') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "2 []\n", result.stderr


def test_a_rank_of_a_launch_is_told_to_start_plainly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["bench", "zero"]) == 2
    assert "bench zero must be started once, without a launcher, got 2 ranks" in capsys.readouterr().err


def test_a_tensor_held_twice_counts_once() -> None:
    class Engine:
        module = nn.Linear(3, 5, bias=False)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)

    module, optimizer = Engine.module, Engine.optimizer
    module(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    module.shared = nn.Parameter(module.weight.detach()[1:])
    held = engine_memory(Engine, arriving=torch.ones(7))
    assert {kind: size for kind, size in held.items() if size} == {
        "parameter_bytes": 60,
        "state_bytes": 60,
        "gradient_bytes": 60 + 28,
    }
