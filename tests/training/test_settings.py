"""What a run is to do, from flags, recipe and DeepSpeed configuration: they complete each other and must agree."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.written import PROGRESS
from tlgc_mp.checkpoint import folder as folders
from tlgc_mp.cli.main import _parser
from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.settings import TrainSettings, resolve


class Setup:
    """Resolves the synthetic run of a small model, with a configuration and more flags, as one of ``world`` ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(
        self, *flags: str, config: dict[str, Any] | None = None, world: int = 1, rank: int = 0
    ) -> TrainSettings:
        arguments = ["train", "--model", "wrn-10-1", "--dataset", "synthetic", "--groups", "4"]
        arguments += ["--output-dir", str(self.folder / "run"), *flags]
        if config is not None:
            path = self.folder / "config.json"
            path.write_text(json.dumps(config))
            arguments += ["--deepspeed_config", str(path)]
        return resolve(_parser().parse_args(arguments), Launch(world, rank, rank, world))


@pytest.fixture
def settle(tmp_path: Path) -> Setup:
    return Setup(tmp_path)


@pytest.mark.parametrize(
    ("world", "groups", "tensor_parallel"),
    [(1, 4, 1), (2, 4, 2), (4, 4, 4), (8, 4, 4), (6, 4, 2), (3, 4, 1), (16, 16, 16), (4, 1, 1)],
)
def test_as_many_tensor_parallel_ranks_as_share_the_groups(
    settle: Setup, world: int, groups: int, tensor_parallel: int
) -> None:
    settings = settle("--groups", str(groups), "--batch-size", "48", world=world)
    assert settings.topology.tensor_parallel == tensor_parallel
    assert settings.topology.data_parallel == world // tensor_parallel
    section = settings.deepspeed_config.get("tensor_parallel")
    assert section == (None if tensor_parallel == 1 else {"autotp_size": tensor_parallel})


def test_ranks_of_a_replica_are_consecutive(settle: Setup) -> None:
    places = [settle("--tp", "2", world=6, rank=rank, config={"train_batch_size": 6}).topology for rank in range(6)]
    assert [(place.dp_rank, place.tp_rank) for place in places] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


@pytest.mark.parametrize(
    ("flags", "config", "world", "micro", "accumulation", "total"),
    [
        ([], {}, 1, 128, 1, 128),  # the recipe's
        ([], {}, 8, 64, 1, 128),  # P = 4, D = 2
        (["--batch-size", "32"], {}, 8, 16, 1, 32),
        ([], {"train_batch_size": 32}, 8, 16, 1, 32),
        (["--batch-size", "32"], {"train_batch_size": 32}, 8, 16, 1, 32),
        ([], {"train_batch_size": "auto"}, 8, 64, 1, 128),
        ([], {"gradient_accumulation_steps": 4}, 8, 16, 4, 128),
        (["--batch-size", "32"], {"gradient_accumulation_steps": 4}, 8, 4, 4, 32),
        ([], {"train_micro_batch_size_per_gpu": 8}, 8, 8, 1, 16),
        ([], {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 3}, 8, 8, 3, 48),
        ([], {"train_micro_batch_size_per_gpu": 8, "train_batch_size": 64}, 8, 8, 4, 64),
    ],
)
def test_batch_arithmetic(
    settle: Setup, flags: list[str], config: dict[str, Any], world: int, micro: int, accumulation: int, total: int
) -> None:
    settings = settle(*flags, config=config, world=world)
    assert (settings.micro_batch, settings.accumulation) == (micro, accumulation)
    found = settings.deepspeed_config
    assert found["train_micro_batch_size_per_gpu"] == micro
    assert found["gradient_accumulation_steps"] == accumulation
    assert found["train_batch_size"] == total == micro * accumulation * settings.topology.data_parallel
    assert settings.batch_size == settings.description()["batch_size"] == total


@pytest.mark.parametrize(
    ("flags", "config", "parts"),
    [
        (
            ["--tp", "1"],
            {"tensor_parallel": {"autotp_size": 2}},
            ("--tp must be tensor_parallel.autotp_size", ", 2, got 1"),
        ),
        (["--batch-size", "64"], {"train_batch_size": 32}, ("--batch-size must be", ", 32, got 64")),
        (["--batch-size", "64"], {"train_micro_batch_size_per_gpu": 16}, ("--batch-size must be", ", 16, got 64")),
        (
            ["--learning-rate", "0.1"],
            {"optimizer": {"type": "SGD", "params": {"lr": 0.2}}},
            ("--learning-rate must be optimizer.params.lr", ", 0.2, got 0.1"),
        ),
        (
            [],
            {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 2},
            ("train_batch_size", "must be 16", "got 32"),
        ),
        (
            [],
            {"train_batch_size": 20, "train_micro_batch_size_per_gpu": 8},
            ("train_batch_size", "must be 16", "got 20"),
        ),
    ],
)
def test_what_is_said_twice_must_agree(
    settle: Setup, flags: list[str], config: dict[str, Any], parts: tuple[str, ...]
) -> None:
    with pytest.raises(UsageError) as refused:
        settle(*flags, config=config, world=2)
    assert all(part in str(refused.value) for part in parts), refused.value


def test_what_is_said_twice_and_agrees_is_taken(settle: Setup) -> None:
    config = {
        "tensor_parallel": {"autotp_size": 2},
        "train_batch_size": 32,
        "optimizer": {"type": "SGD", "params": {"lr": 0.2}},
    }
    settings = settle("--tp", "2", "--batch-size", "32", "--learning-rate", "0.2", config=config, world=4)
    assert (settings.topology.tensor_parallel, settings.topology.data_parallel) == (2, 2)
    assert (settings.micro_batch, settings.learning_rate) == (16, 0.2)


@pytest.mark.parametrize(
    ("flags", "config", "rate"),
    [
        ([], {}, 0.1),
        (["--recipe", "digits"], {}, 0.05),
        (["--learning-rate", "0.3"], {}, 0.3),
        ([], {"optimizer": {"type": "SGD", "params": {"lr": 0.2}}}, 0.2),
    ],
)
def test_learning_rate_from_flag_configuration_or_recipe(
    settle: Setup, flags: list[str], config: dict[str, Any], rate: float
) -> None:
    assert settle(*flags, config=config).learning_rate == rate


def test_epochs_from_flag_or_recipe(settle: Setup) -> None:
    assert settle().epochs == 200
    assert settle("--recipe", "digits").epochs == 12
    assert settle("--epochs", "3").epochs == 3


def test_activation_checkpointing_where_asked_for(settle: Setup) -> None:
    assert settle("--activation-checkpointing").activation_checkpointing
    assert not settle().activation_checkpointing


def test_batch_that_does_not_divide_among_the_replicas(settle: Setup) -> None:
    with pytest.raises(
        UsageError, match="the batch must be a multiple of 4, 2 replicas x 2 accumulation steps, got 30"
    ):
        settle("--batch-size", "30", config={"gradient_accumulation_steps": 2}, world=8)


def test_resolving_writes_nothing(settle: Setup) -> None:
    settings = settle()
    assert not Path(settings.output_dir).exists()
    assert settings.output_dir == str(settle.folder / "run")


def test_what_a_run_is(settle: Setup) -> None:
    """By these names it stands in checkpoints and in tables of runs."""
    flags = ("--batch-size", "8", "--data-dir", "images", "--momentum", "0.5", "--epochs", "3", "--workers", "0")
    config = {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": 2}}
    assert settle(*flags, config=config, world=8, rank=5).description() == {
        **{"model": "wrn-10-1", "conv": "gc-2l", "groups": 4},
        **{"coarse_everywhere": False, "coarse_kernel_size": None, "coarse_init": "zero"},
        **{"coarse_channels": 1, "coarse_sum": False},
        **{"dataset": "synthetic", "data_dir": str(Path("images").absolute()), "data_fingerprint": None},
        **{"val_split": None, "image_size": None, "seed": 0},
        **{"tensor_parallel": 4, "data_parallel": 2, "zero_stage": 2, "accumulation": 2, "batch_size": 8},
        **{"recipe": "cifar", "departures": {"momentum": 0.5}, "epochs": 3, "limit_steps": None, "learning_rate": 0.1},
    }


@pytest.mark.parametrize(
    ("flag", "least", "most"),
    [
        *[(f"--{name}", 1, 10**9) for name in ("epochs", "batch-size", "limit-steps", "log-interval", "keep")],
        *[("--save-every-steps", 1, 10**9), ("--profile", 1, 1000), ("--workers", 0, 256)],
        *[("--seed", 0, 2**63 - 1), ("--image-size", 8, 4096)],
    ],
)
def test_counts_have_bounds(settle: Setup, flag: str, least: int, most: int) -> None:
    for value in (least, most):
        settle(flag, str(value))
    with pytest.raises(UsageError, match=f"^{flag} must be {least} or more, got {least - 1}$"):
        settle(flag, str(least - 1))
    with pytest.raises(UsageError, match=f"^{flag} must be {most} or less, got {most + 1}$"):
        settle(flag, str(most + 1))


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--learning-rate", "inf", "--learning-rate must be a positive number, got inf; use e.g. 0.1"),
        ("--save-every", "0", "--save-every must be a positive number of minutes, 10080 at most, got 0.0; use e.g. 10"),
        ("--rank-timeout", "0.5", "--rank-timeout must be 1 to 604800 seconds, got 0.5; use e.g. 60"),
    ],
)
def test_other_values_have_bounds(settle: Setup, flag: str, value: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        settle(flag, value)
    assert str(refused.value) == said


def test_a_checkpoint_tells_where_the_coarse_level_is(settle: Setup) -> None:
    flags = ("--model", "mobilenet_v2")
    descriptions = [settle(*flags).description(), settle(*flags, "--coarse-everywhere").description()]
    assert [description["coarse_everywhere"] for description in descriptions] == [False, True]


def test_resume_auto_goes_on_where_there_is_something_to_go_on_from(settle: Setup) -> None:
    assert settle("--resume", "auto").resume_from is None
    checkpoints = settle.folder / "run" / "checkpoints"
    _save(checkpoints, "epoch-1", settle())
    _save(checkpoints, "epoch-2", settle())
    assert settle("--resume", "auto").resume_from == (str(checkpoints), "epoch-2")
    (checkpoints / "epoch-2" / "shard").write_text("")
    assert settle("--resume", "auto").resume_from == (str(checkpoints), "epoch-1")
    (checkpoints / "epoch-1" / "shard").unlink()
    with pytest.raises(UsageError, match=r"^--resume: .*epoch-2/shard' is damaged.*no whole checkpoint lies before it"):
        settle("--resume", "auto")


def test_resume_auto_does_not_begin_in_the_folder_of_another_run(settle: Setup) -> None:
    checkpoints = settle.folder / "run" / "checkpoints"
    _save(checkpoints, "epoch-1", settle("--seed", "1"))
    with pytest.raises(UsageError, match="--resume must be of a run with seed=0, got 1 in"):
        settle("--resume", "auto")


def _save(checkpoints: Path, tag: str, settings: TrainSettings) -> None:
    folders.begin(str(checkpoints), tag)
    shard = checkpoints / f"{tag}.partial" / "shard"
    shard.write_text("weights")
    state = {"run": settings.description(), "num_classes": 10, "progress": PROGRESS}
    folders.commit(str(checkpoints), tag, {"client_state": state, "files": {"shard": folders.sealed(str(shard))}})
