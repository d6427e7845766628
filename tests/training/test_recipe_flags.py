"""Recipes by flags: torch's and torchvision's own on one device are the oracle, over ranks and after a resume too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import lr_scheduler, swa_utils
from torchvision.transforms import v2

from tests.launch.forked import figures
from tests.ranks import run_ranks
from tests.training.runs import metrics, step_metrics, tlgc_mp, train, train_until
from tlgc_mp.checkpoint import load_model
from tlgc_mp.checkpoint.offline import export_checkpoint
from tlgc_mp.cli.main import _parser
from tlgc_mp.data.streams import global_stream
from tlgc_mp.errors import UsageError
from tlgc_mp.models import create_model
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.headline import average_note
from tlgc_mp.training.settings import TrainSettings, resolve

SEED = 5
TOTAL = 8
"""Steps, of 4 epochs."""
RECIPES = {
    "adamw, cosine": ("--optimizer", "adamw", "--lr", "0.01", "--weight-decay", "0.1", "--schedule", "cosine"),
    "onecycle": ("--schedule", "onecycle", "--lr", "0.1", "--label-smoothing", "0.1", "--ema", "0.6"),
    "onecycle, adamw": ("--schedule", "onecycle", "--optimizer", "adamw", "--ema", "0.5"),
    "warm-up": ("--warmup-epochs", "1", "--momentum", "0.5", "--weight-decay", "0.01", "--mixup", "0.4"),
    "warm-up, cosine": ("--warmup-epochs", "2", "--schedule", "cosine", "--mixup", "1", "--label-smoothing", "0.2"),
}


def _settings(flags: tuple[str, ...], world: int = 1, *more: str) -> TrainSettings:
    options = ["train", "--model", "wrn-10-1", "--dataset", "synthetic", "--groups", "4", "--batch-size", "8"]
    options += ["--epochs", "4", "--seed", str(SEED), "--output-dir", "nowhere", *flags, *more]
    return resolve(_parser().parse_args(options), Launch(world, 0, 0, world))


def _model() -> torch.nn.Module:
    torch.manual_seed(SEED)
    return create_model("wrn-10-1", groups=4, num_classes=10).double()


def _batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(SEED)
    return [
        (
            torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64),
            torch.randint(10, (8,), generator=generator),
        )
        for _ in range(TOTAL)
    ]


Trained = tuple[list[float], list[float], dict[str, Tensor], dict[str, Tensor]]
"""Losses, rates, the weights that it is judged by, and those that it goes on with."""


def _on_one_device(flags: tuple[str, ...]) -> Trained:
    """Written out by hand, of torch's and torchvision's parts."""
    asked = dict(zip(flags[::2], flags[1::2], strict=True))
    model, adamw = _model(), "adamw" in flags
    rate = float(asked.get("--lr", 0.001 if adamw else 0.1))
    decay = float(asked.get("--weight-decay", 0.01 if adamw else 5e-4))
    optimizer: torch.optim.Optimizer
    if adamw:
        optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=decay)
    else:
        momentum = float(asked.get("--momentum", 0.9))
        optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum, weight_decay=decay)
    warmup = 2 * int(asked.get("--warmup-epochs", 0))
    schedule: Any
    if asked.get("--schedule") == "onecycle":
        schedule = lr_scheduler.OneCycleLR(optimizer, rate, total_steps=TOTAL)
    else:
        rising = [lr_scheduler.LinearLR(optimizer, 0.01, total_iters=warmup)] if warmup else []
        if asked.get("--schedule") == "cosine":
            main: Any = lr_scheduler.CosineAnnealingLR(optimizer, TOTAL - warmup)
        else:  # at 0.3, 0.6 and 0.8 of 8 steps
            main = lr_scheduler.MultiStepLR(optimizer, [step - warmup for step in (2, 5, 6)], 0.1)
        schedule = lr_scheduler.SequentialLR(optimizer, [*rising, main], [warmup] if warmup else [])
    average = None
    if "--ema" in asked:
        average = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(float(asked["--ema"])))
    losses, rates = [], []
    for step, (images, labels) in enumerate(_batches()):
        if "--mixup" in asked:
            with global_stream(SEED, "mixup", step):
                images, labels = v2.MixUp(alpha=float(asked["--mixup"]), num_classes=10)(images, labels)
        smoothing = float(asked.get("--label-smoothing", 0))
        loss = F.cross_entropy(model(images), labels, label_smoothing=smoothing)
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if average is not None:
            average.update_parameters(model)
        losses.append(loss.item())
    weights = dict(model.named_parameters())
    judged = weights if average is None else dict(average.module.named_parameters())
    return losses, rates, judged, weights


def _over_ranks(flags: tuple[str, ...], tensor_parallel: int, stage: int) -> Trained:
    import os

    from tlgc_mp.engine import initialize
    from tlgc_mp.parallel.sharding import gather_state_dict
    from tlgc_mp.training import optimization
    from tlgc_mp.training.averaging import Average

    dtype = torch.float64 if stage == 0 else torch.float32  # as ZeRO has it
    settings = _settings(flags, int(os.environ["WORLD_SIZE"]), "--tp", str(tensor_parallel))
    config: dict[str, Any] = {"train_batch_size": 8, "zero_optimization": {"stage": stage}}
    config["zero_allow_untested_optimizer"] = True
    if tensor_parallel > 1:
        config["tensor_parallel"] = {"autotp_size": tensor_parallel}
    engine, optimizer, _, _ = initialize(
        model=_model().to(dtype),
        optimizer=optimization.make_optimizer(settings),
        lr_scheduler=optimization.make_scheduler(settings, TOTAL // 4),
        config=config,
    )
    average, criterion = Average(engine, settings.method.ema), optimization.Loss(settings, 10)
    losses, rates = [], []
    for step, batch in enumerate(_batches()):
        images, labels = criterion.mixed(batch[0].to(dtype), batch[1], step)
        loss = criterion(engine(images), labels)
        rates.append(optimizer.param_groups[0]["lr"])
        engine.backward(loss)
        engine.step()
        average.step()
        losses.append(loss.item())
    with average.in_place():
        judged = gather_state_dict(engine.module)
    return losses, rates, judged, gather_state_dict(engine.module)


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("recipe", RECIPES)
def test_as_on_one_device(recipe: str, ranks: int) -> None:
    """In float64: exact but for the order of sums. ZeRO 0 keeps that type."""
    losses, rates, judged, weights = _on_one_device(RECIPES[recipe])
    found = run_ranks(ranks, _over_ranks, RECIPES[recipe], ranks, 0)[0]
    assert found[0] == pytest.approx(losses, rel=1e-9)
    assert found[1] == pytest.approx(rates, rel=1e-12)
    for expected, state in ((judged, found[2]), (weights, found[3])):
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value.detach(), rtol=1e-8, atol=1e-9, msg=name)
    if "--ema" in RECIPES[recipe]:
        assert any(not torch.equal(judged[name], weights[name]) for name in weights)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("world", "ranks", "stage"), [(2, 2, 1), (2, 1, 2), (2, 1, 3)])
def test_the_average_at_each_zero_stage(world: int, ranks: int, stage: int) -> None:
    """Replicas take the same images here, so that two train as one does."""
    losses, _, judged, weights = _on_one_device(RECIPES["onecycle"])
    found = run_ranks(world, _over_ranks, RECIPES["onecycle"], ranks, stage)[0]
    assert found[0] == pytest.approx(losses, rel=1e-3)
    for expected, state in ((judged, found[2]), (weights, found[3])):
        for name, value in expected.items():
            torch.testing.assert_close(state[name].double(), value.detach(), rtol=1e-2, atol=1e-3, msg=name)


@pytest.mark.parametrize(("decay", "share", "better"), [("0.999", 67, "0.97"), ("0.99", 2, "0.97"), ("0.97", 0, "")])
def test_an_average_of_the_beginning_is_told(decay: str, share: int, better: str) -> None:
    """After 400 steps: a run as short as that is judged by what it began with."""
    said = average_note(_settings(("--ema", decay)), 100)
    assert share == round(100 * float(decay) ** 400)
    assert said == (
        f"Of the average that is tested, {share} % will be the weights it began with when all 400 steps are done; "
        f"--ema {better} forgets them sooner"
        if share
        else ""
    )
    assert average_note(_settings(()), 100) == ""


@pytest.mark.timeout(240)
@pytest.mark.parametrize("recipe", ["onecycle", "warm-up, cosine", "adamw, cosine"])
def test_goes_on_as_if_never_stopped(tmp_path: Path, recipe: str) -> None:
    flags = ("--tp", "2", *RECIPES[recipe], "--epochs", "4", "--limit-steps", "3", "--log-interval", "1")
    whole = run_ranks(2, train, str(tmp_path / "whole"), *flags)
    assert [outcome.status for outcome in whole] == [0, 0], whole[0].stderr
    run_ranks(2, train_until, (1, 4), str(tmp_path / "run"), *flags)
    resumed = run_ranks(2, tlgc_mp, "train", "--resume", "--output-dir", str(tmp_path / "run"))
    assert [outcome.status for outcome in resumed] == [0, 0], resumed[0].stderr
    assert figures(metrics(tmp_path / "run")) == figures(metrics(tmp_path / "whole"))
    assert [line["loss"] for line in step_metrics(tmp_path / "run")] == [
        line["loss"] for line in step_metrics(tmp_path / "whole")
    ]
    states = []
    for run in ("run", "whole"):
        export_checkpoint(str(tmp_path / run), str(tmp_path / f"{run}.safetensors"))
        states.append(load_model(str(tmp_path / f"{run}.safetensors")).state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.timeout(240)
def test_flags_may_change_where_they_are_named(tmp_path: Path) -> None:
    (outcome,) = run_ranks(1, train, str(tmp_path), "--epochs", "2", "--limit-steps", "2", "--weight-decay", "0.01")
    assert outcome.status == 0, outcome.stderr
    words = ("train", "--resume", "--output-dir", str(tmp_path), "--epochs", "4", "--schedule", "cosine", "--momentum")
    (outcome,) = run_ranks(1, tlgc_mp, *words, "0.8", "--ema", "0.5")
    assert outcome.status == 0, outcome.stderr
    said = "Changed from here on: epochs 2 -> 4, momentum 0.9 -> 0.8, schedule step -> cosine, ema None -> 0.5; "
    assert said in outcome.stdout
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    schedule = lr_scheduler.CosineAnnealingLR(optimizer, 8)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert [line["learning_rate"] for line in metrics(tmp_path)][2:] == pytest.approx([rates[5], rates[7]])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--optimizer", "adam"), "--optimizer must be one of sgd, adamw, got 'adam'"),
        (("--schedule", "poly"), "--schedule must be one of step, cosine, onecycle, got 'poly'"),
        (("--momentum", "1"), "--momentum must be 0 or more and less than 1, got 1.0; use e.g. 0.9"),
        (("--weight-decay", "nan"), "--weight-decay must be 0 or more, got nan; use e.g. 5e-4"),
        (("--label-smoothing", "1"), "--label-smoothing must be 0 or more and less than 1, got 1.0"),
        (("--mixup", "0"), "--mixup must be a positive number, got 0.0; use e.g. 0.2"),
        (("--ema", "1"), "--ema must be more than 0 and less than 1, got 1.0"),
        (("--warmup-epochs", "4"), "--warmup-epochs must be less than the 4 epochs, got 4"),
        (("--warmup-epochs", "1", "--schedule", "onecycle"), "--warmup-epochs must be left out with --schedule"),
        (("--optimizer", "adamw", "--momentum", "0.9"), "--momentum must be left out with --optimizer adamw"),
    ],
)
def test_what_cannot_work_is_refused(flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        _settings(flags)
    assert str(refused.value).startswith(said), refused.value


def test_flags_beside_a_deepspeed_optimizer(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text('{"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}')
    with pytest.raises(UsageError, match="--momentum must be left out where the DeepSpeed configuration has its own"):
        _settings(("--momentum", "0.9", "--deepspeed_config", str(path)))


def test_only_departures_from_the_recipe_are_told() -> None:
    told = [_settings(flags).description()["departures"] for flags in ((), ("--momentum", "0.9"), ("--ema",))]
    assert told == [{}, {}, {"ema": 0.999}]
