"""Forms of a network for inference: measured, and told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tlgc_mp import create_model, fold
from tlgc_mp.bench import inference
from tlgc_mp.bench.scaling.flops import layer_flops
from tlgc_mp.cli.main import main


@pytest.mark.filterwarnings("ignore")
@pytest.mark.timeout(240)
def test_quick_run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    assert main(["bench", "inference", "--quick", "--output", str(tmp_path)]) == 0
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    found = json.loads((tmp_path / "inference.json").read_text())
    rows = found["rows"]
    assert [(row["conv"], row["folded"]) for row in rows] == [
        (conv, folded) for conv in inference.CONVOLUTIONS for folded in (False, True)
    ]
    assert all(row["torch_ms"] > 0 and row["onnx_ms"] > 0 and row["difference"] < 1e-5 for row in rows)
    dense, two_level = rows[0], rows[5]
    assert two_level["nodes"] <= dense["nodes"]
    assert dense["parameters"] == sum(param.numel() for param in create_model("wrn-10-1", conv="sc").parameters())
    assert 4 * dense["parameters"] < dense["bytes"] < 4 * dense["parameters"] + 20_000
    text = (tmp_path / "inference.md").read_text()
    assert f"| {two_level['torch_ms']:.2f} |" in text and "| gc-2l, N = 4, folded |" in text
    assert "Wrote inference.json" in capfd.readouterr().out


@pytest.mark.parametrize(("conv", "groups"), [("sc", 1), ("gc", 4), ("gc-2l", 4)])
def test_flops_are_those_of_the_formulas(conv: str, groups: int) -> None:
    model = create_model("wrn-16-2", conv=conv, groups=groups).eval()
    forward = layer_flops("wrn-16-2", conv, groups, batch_size=3)
    expected = sum(count // (2 if name == "stem" else 3) for name, count in forward.items())
    assert inference.flops(model, torch.zeros(3, 3, 32, 32)) == expected


def test_a_folded_model_is_counted_as_it_is_computed() -> None:
    """1x1 convolutions of narrow groups are dense ones by then."""
    counts = []
    for conv, groups in (("sc", 1), ("gc-2l", 4)):
        model = create_model("mobilenet_v2", conv=conv, groups=groups, coarse_everywhere=groups > 1, device="meta")
        counts.append(inference.flops(fold(model), torch.zeros(1, 3, 64, 64, device="meta")))
    assert counts[0] == counts[1]


def test_errors_of_the_paper() -> None:
    assert inference.paper_error("mobilenet_v2", "gc-2l", 4) == 36.88
    assert inference.paper_error("wrn-28-10", "sc", 1) == 4.19
    assert inference.paper_error("wrn-10-1", "sc", 1) is None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--groups", "0"], "--groups must be 1 or more, got 0"),
        (["--groups", "3"], "groups must be a divisor of the stem's 32 channels, got 3; use one of 1, 2, 4, 8"),
        (["--rounds", "0"], "--rounds must be 1 or more, got 0"),
        (["--batch-size", "0"], "--batch-size must be 1 or more, got 0"),
        (["--models", "wrn-11-2"], "wrn-11-2"),
    ],
)
def test_mistakes(options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "inference", "--output", str(tmp_path / "out"), *options]) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1
    assert not list(tmp_path.iterdir())
