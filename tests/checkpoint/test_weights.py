"""Starting from another run's weights: exactly those, over any ranks, and what does not fit is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ranks import run_ranks
from tests.training.runs import tlgc_mp, train
from tlgc_mp.checkpoint import load_model
from tlgc_mp.checkpoint.offline import export_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a run of two tensor-parallel ranks, and the file exported from it."""
    folder = tmp_path_factory.mktemp("source")
    outcomes = run_ranks(2, train, str(folder / "run"), "--tp", "2", "--epochs", "1", "--limit-steps", "3")
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    export_checkpoint(str(folder / "run"), str(folder / "run.safetensors"))
    return folder / "run", folder / "run.safetensors"


def _filled(path: str, tensor_parallel: int, stage: int, classes: int) -> tuple[list[str], dict[str, Tensor]]:
    """(what was not taken, the whole model's state) of an engine with other weights of its own."""
    import tlgc_mp
    from tlgc_mp.checkpoint.weights import load_weights
    from tlgc_mp.parallel.sharding import gather_state_dict

    config: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": stage}}
    config["zero_allow_untested_optimizer"] = True
    if tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": tensor_parallel}
    model = tlgc_mp.create_model("wrn-10-1", groups=4, num_classes=classes, device="meta")
    engine, _, _, _ = tlgc_mp.initialize(
        model=model,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
        config={**config, "zero_allow_untested_optimizer": True},
        seed=11,
    )
    left = load_weights(engine, path)
    return left, gather_state_dict(engine.module)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("exported", [False, True])
@pytest.mark.parametrize(("world", "tensor_parallel", "stage"), [(2, 2, 1), (2, 1, 2), (2, 1, 3), (1, 1, 0), (4, 2, 3)])
def test_the_weights_are_the_others(
    source: tuple[Path, Path], exported: bool, world: int, tensor_parallel: int, stage: int
) -> None:
    expected = load_model(str(source[1])).state_dict()
    left, state = run_ranks(world, _filled, str(source[exported]), tensor_parallel, stage, 10)[0]
    assert left == []
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(state[name], value), name


@pytest.mark.timeout(120)
def test_a_head_that_does_not_fit_keeps_its_own(source: tuple[Path, Path]) -> None:
    expected = load_model(str(source[1])).state_dict()
    left, state = run_ranks(2, _filled, str(source[1]), 2, 1, 7)[0]
    assert [name.rpartition(".")[2] for name in left] == ["bias", "weight"]
    assert [tuple(state[name].shape) for name in left] == [(7,), (7, expected[left[1]].shape[1])]
    assert all(torch.isfinite(state[name]).all() for name in left)
    for name in expected.keys() - set(left):
        assert torch.equal(state[name], expected[name]), name


@pytest.mark.timeout(120)
def test_the_command_says_what_it_begins_with(source: tuple[Path, Path], tmp_path: Path) -> None:
    flags = ("--num-classes", "7", "--epochs", "1", "--limit-steps", "2", "--log-interval", "1")
    best = source[0] / "checkpoints" / "best"
    outcomes = run_ranks(2, train, str(tmp_path / "run"), *flags, "--init-from", str(best))
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    (line,) = [line for line in outcomes[0].stdout.splitlines() if line.startswith("Beginning with the weights in ")]
    assert line.startswith(f"Beginning with the weights in {best}, but for ") and line.endswith(".weight")
    resumed = run_ranks(1, tlgc_mp, "train", "--resume", "--output-dir", str(tmp_path / "run"), "--epochs", "2")
    assert resumed[0].status == 0, resumed[0].stderr
    assert "Beginning with" not in resumed[0].stdout


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("model", "path", "said"),
    [
        ("wrn-16-1", "run", "path must be a file of the weights of this model, got PATH, where "),
        ("wrn-10-2", "run.safetensors", "path must be a file of the weights of this model, got PATH, where "),
        ("wrn-10-1", "nowhere", "got PATH; give the --output-dir of a run that saved one, or a file that"),
        ("wrn-10-1", "run/run.yaml", "path must be a checkpoint or a safetensors file, got PATH: "),
    ],
)
def test_what_cannot_be_begun_with_is_refused(
    source: tuple[Path, Path], tmp_path: Path, model: str, path: str, said: str
) -> None:
    flags = ("--model", model, "--init-from", str(source[0].parent / path))
    (outcome,) = run_ranks(1, train, str(tmp_path / "run"), *flags)
    assert outcome.status == 2
    given = repr(str(source[0].parent / path))
    assert "--init-from: " in outcome.stderr and said.replace("PATH", given) in outcome.stderr
