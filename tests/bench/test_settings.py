"""What a benchmark is to measure, from its flags; a mistake is told in one line before anything starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tlgc_mp.bench.scaling import capacity
from tlgc_mp.bench.settings import QUICK_STRATEGIES, BenchSettings, Case, resolve
from tlgc_mp.cli.main import _parser, main
from tlgc_mp.models import create_model

# name: (flags, what the line holds). In flags, {tmp} is the test's folder.
MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "strategy": (
        ["--strategies", "gc2l"],
        [
            "--strategies must be one of gc-2l, gc, shuffle, bgc, naive-mp, pipeline, channel-parallel, zero3",
            "@P, got 'gc2l'",
        ],
    ),
    "strategy at no number": (
        ["--strategies", "gc-2l@two"],
        [
            "--strategies must be NAME or NAME@P, with P a number of ranks, got 'gc-2l@two'; use e.g. gc-2l@2",
        ],
    ),
    "strategy at zero": (
        ["--strategies", "gc-2l@0"],
        [
            "--strategies must be NAME or NAME@P, with P a number of ranks, got 'gc-2l@0'; use e.g. gc-2l@2",
        ],
    ),
    "no ranks": (["--tp", "0"], ["--tp must be 1 to 256 ranks, got 0"]),
    "one rank of pipeline": (
        ["--tp", "1", "--strategies", "pipeline"],
        ["--tp must be 2 or more for pipeline, got 1; use pipeline@2, or leave it out"],
    ),
    "two ranks, all groups on one": (
        ["--strategies", "gc-2l-dense"],
        ["--tp must be 1 for gc-2l-dense, which holds all groups on one rank, got 2; use gc-2l-dense@1"],
    ),
    "ranks do not divide the stem": (
        ["--tp", "3", "--strategies", "gc-2l"],
        [
            "groups must be a divisor of the stem's 16 channels, got 3; use one of 1, 2, 4, 8, 16",
        ],
    ),
    "ranks do not divide the groups": (
        ["--tp", "4", "--groups", "2", "--strategies", "gc-2l"],
        ["tensor_parallel must be a divisor of groups=2, got 4; use one of 1, 2"],
    ),
    "groups zero": (
        ["--groups", "0", "--strategies", "gc-2l"],
        ["groups must be a divisor of the stem's 16 channels, got 0; use one of 1, 2, 4, 8, 16", "1, 2, 4, 8, 16"],
    ),
    "more ranks than units": (
        ["--depth", "10", "--tp", "4", "--strategies", "naive-mp"],
        ["--tp must be 1 to 3 for naive-mp, the number of residual units of wrn-10-40, got 4"],
    ),
    "more ranks of a pipeline than units": (
        ["--depth", "10", "--tp", "4", "--strategies", "pipeline"],
        ["--tp must be 2 to 3 for pipeline, the number of residual units of wrn-10-40, got 4"],
    ),
    "width": (["--widths", "0"], ["model must be of a widening factor of 1 or more, got 'wrn-28-0'", "1 or more"]),
    "width no number": (["--widths", "forty"], ["--widths", "'forty'"]),
    "depth": (
        ["--depth", "11"],
        ["model must be of a depth 6 u + 4, got 'wrn-11-40'; use one of 10, 16, 22, 28, 34, 40", "10, 16, 22"],
    ),
    "depth zero": (
        ["--depth", "0"],
        ["model must be of a depth 6 u + 4, got 'wrn-0-40'; use one of 10, 16, 22, 28, 34, 40", "10, 16, 22"],
    ),
    "batch sizes": (
        ["--widths", "10", "20", "40", "--batch-sizes", "8", "4"],
        ["--batch-sizes", "all 3 widths, or one for each, got 2"],
    ),
    "batch size": (["--batch-sizes", "0"], ["--batch-sizes must be 1 or more, got 0", "1 or more"]),
    "batch of zero3": (
        ["--widths", "10", "--batch-sizes", "3", "--strategies", "zero3"],
        [
            "--batch-sizes must be a multiple of 2, the replicas of zero3, at width 10, got 3",
            "multiple of 2",
        ],
    ),
    "micro-batches": (
        ["--widths", "10", "--batch-sizes", "6", "--micro-batches", "4", "5", "--strategies", "pipeline"],
        [
            "--micro-batches must hold a divisor of the batch of 6 at width 10, got 4 5; use one of 1, 2, 3, 6",
            "batch of 6",
            "1, 2, 3, 6",
        ],
    ),
    "micro-batches zero": (["--micro-batches", "0"], ["--micro-batches must be 1 or more, got 0", "1 or more"]),
    "rounds": (["--rounds", "0"], ["--rounds must be 1 or more, got 0", "1 or more"]),
    "steps": (["--steps", "-1"], ["--steps must be 1 or more, got -1", "1 or more"]),
    "representatives": (["--coarse-channels", "0"], ["coarse_channels must be 1 to 10000", "got 0"]),
    "representatives of none": (["--strategies", "gc", "--coarse-sum"], ["--coarse-sum must be left out", "gc-2l"]),
    "hosts": (["--hosts", "a", "b", "--strategies", "naive-mp@3"], ["--hosts", "2 hosts", "3 ranks", "1, 3"]),
    "dtype": (["--dtype", "fp16"], ["--dtype must be one of fp32, bf16, got 'fp16'", "fp32, bf16"]),
    "ranks beyond a machine": (["--strategies", "zero3@257"], ["--tp must be 1 to 256 ranks, got 257"]),
    "ranks that are no number": (["--strategies", "gc@" + "9" * 5000], ["number of ranks", "gc@2"]),
    "batch beyond reason": (["--batch-sizes", "9" * 400], ["--batch-sizes must be 1000000 or less, got"]),
    "rounds beyond reason": (["--rounds", "9" * 400], ["--rounds must be 1000000 or less, got"]),
    "time limit": (
        ["--time-limit", "nan"],
        ["--time-limit must be a positive number of seconds, got nan; use e.g. 1800"],
    ),
    "flag": (["--width", "10"], ["--width", "--help"]),
    "output is a file": (["--output", "{tmp}/file"], ["--output", "{tmp}/file", "folder"]),
    "output in a file": (["--output", "{tmp}/file/run"], ["--output", "{tmp}/file/run", "folder"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_told_in_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    flags, expected = MISTAKES[name]
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    assert main(["bench", "scaling", "--output", str(tmp_path / "run"), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    for part in expected:
        assert part.format(tmp=tmp_path) in captured.err
    assert not list(tmp_path.glob("run/*"))


def test_a_rank_of_a_launch_is_told_to_start_plainly(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["bench", "scaling", "--output", str(tmp_path / "run")]) == 2
    assert "bench scaling must be started once, without a launcher, got 2 ranks" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def _settle(tmp_path: Path, *flags: str) -> BenchSettings:
    return resolve(_parser().parse_args(["bench", "scaling", "--output", str(tmp_path), *flags]))


def test_cases_of_a_round(tmp_path: Path) -> None:
    flags = [
        "--widths",
        "40",
        "60",
        "--tp",
        "2",
        "4",
        "--strategies",
        "gc-2l@4",
        "naive-mp",
        "pipeline@2",
        "--batch-sizes",
        "8",
        "4",
    ]
    assert _settle(tmp_path, *flags).cases == tuple(
        case
        for width, batch_size, micro_batches in ((40, 8, (2, 4, 8)), (60, 4, (2, 4)))
        for case in (
            Case("gc-2l", 28, width, 4, 4, batch_size),
            Case("naive-mp", 28, width, 1, 2, batch_size),
            Case("naive-mp", 28, width, 1, 4, batch_size),
            Case("pipeline", 28, width, 1, 2, batch_size, micro_batches),
        )
    )


def test_the_paper_s_widths_where_nothing_is_said(tmp_path: Path) -> None:
    settings = _settle(tmp_path)
    assert [(case.width, case.batch_size, case.strategy) for case in settings.cases] == [
        (width, batch_size, strategy)
        for width, batch_size in ((40, 8), (60, 4), (80, 2))
        for strategy in ("gc-2l", "naive-mp")
    ]
    assert (settings.rounds, settings.steps, settings.dtype, settings.momentum) == (2, 2, "fp32", True)


def test_quick_covers_every_strategy_and_yields_to_other_flags(tmp_path: Path) -> None:
    settings = _settle(tmp_path, "--quick")
    assert [case.strategy for case in settings.cases] == list(QUICK_STRATEGIES)
    assert {(case.width, case.depth, case.ranks) for case in settings.cases} == {(10, 28, 2)}
    assert (settings.rounds, settings.steps) == (1, 1)
    settings = _settle(tmp_path, "--quick", "--widths", "1", "--depth", "10", "--rounds", "3", "--strategies", "gc@1")
    assert settings.cases == (Case("gc", 10, 1, 1, 1, 8),) and settings.rounds == 3


def test_activation_checkpointing_is_of_the_strategies_it_applies_to(tmp_path: Path) -> None:
    settings = _settle(tmp_path, "--quick", "--activation-checkpointing")
    checkpointed = [case.strategy for case in settings.cases if case.activation_checkpointing]
    assert checkpointed == ["gc-2l", "gc", "shuffle", "bgc", "channel-parallel"]
    assert not any(case.activation_checkpointing for case in _settle(tmp_path, "--quick").cases)
    plain, less = (Case("gc-2l", 28, 40, 2, 2, 64, activation_checkpointing=on) for on in (False, True))
    assert capacity.needed_bytes(less, True) < 0.6 * capacity.needed_bytes(plain, True)


@pytest.mark.parametrize(
    ("conv", "groups", "dial"),
    [("sc", 1, ()), ("gc", 4, ()), ("bgc", 4, ()), ("gc-2l", 4, ()), ("gc-2l", 4, (3, False)), ("gc-2l", 4, (2, True))],
)
@pytest.mark.parametrize("model", [(10, 1), (16, 2), (28, 10)])
def test_parameters_are_counted_without_torch(
    conv: str, groups: int, dial: tuple[int, bool], model: tuple[int, int]
) -> None:
    arguments = dict(zip(("coarse_channels", "coarse_sum"), dial, strict=False))
    built = create_model("wrn-{}-{}".format(*model), conv=conv, groups=groups, device="meta", **arguments)
    assert capacity.parameter_count(*model, conv, groups, *dial) == sum(p.numel() for p in built.parameters())


def test_the_dial_is_of_two_level_networks(tmp_path: Path) -> None:
    flags = ("--strategies", "gc-2l", "gc", "--coarse-channels", "3", "--coarse-sum")
    cases = _settle(tmp_path, "--widths", "1", *flags).cases
    assert [(case.strategy, case.coarse_channels, case.coarse_sum) for case in cases] == [
        ("gc-2l", 3, True),
        ("gc", 1, False),
    ]


def test_the_dense_network_of_width_80_needs_28_gb() -> None:
    """Parameters, gradients and momentum alone."""
    dense = Case("naive-mp", 28, 80, 1, 2, 2)
    assert 28e9 < capacity.needed_bytes(dense, momentum=True) < 34e9
    assert 18e9 < capacity.needed_bytes(dense, momentum=False) < 25e9
    assert 9e9 < capacity.needed_bytes(dense, momentum=False, update_in_backward=True) < 16e9


def test_help_loads_no_torch() -> None:
    code = (
        "import sys; from tlgc_mp.cli.main import main\n"
        "try: main(['bench', 'scaling', '--help'])\nexcept SystemExit: pass\n"
        "print([name for name in ('torch', 'deepspeed', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip().endswith("[]")
