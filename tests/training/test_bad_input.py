"""A mistake of the user's is answered at once, in one line that names it and says what would work, on rank 0 alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.checkpoint.written import PROGRESS, RUN
from tlgc_mp.checkpoint.folder import description_text, sealed
from tlgc_mp.cli.main import main

SYNTHETIC = ["--dataset", "synthetic", "--model", "wrn-10-1", "--image-size", "8"]

# name: (ranks started, arguments of train, what the line holds). In arguments, {tmp} is the test's folder.
MISTAKES: dict[str, tuple[int, list[str], list[str]]] = {
    "groups do not divide the channels": (
        1,
        [*SYNTHETIC, "--groups", "3"],
        ["groups must be a divisor of the stem's 16 channels, got 3", "1, 2, 4, 8, 16"],
    ),
    "groups zero": (
        1,
        [*SYNTHETIC, "--groups", "0"],
        ["groups must be a divisor of the stem's 16 channels, got 0", "1, 2, 4, 8, 16"],
    ),
    "groups negative": (
        1,
        [*SYNTHETIC, "--groups", "-4"],
        ["groups must be a divisor of the stem's 16 channels, got -4", "1, 2, 4, 8, 16"],
    ),
    "groups not a number": (1, [*SYNTHETIC, "--groups", "four"], ["--groups", "'four'", "int"]),
    "groups of a dense convolution": (
        1,
        [*SYNTHETIC, "--conv", "sc", "--groups", "4"],
        ["groups must be 1 with conv='sc', the dense convolution, got 4"],
    ),
    "ranks do not divide the groups": (
        8,
        [*SYNTHETIC, "--tp", "8"],
        ["tensor_parallel must be a divisor of groups=4, got 8", "1, 2, 4"],
    ),
    "ranks do not divide the world": (
        3,
        [*SYNTHETIC, "--tp", "2"],
        ["tensor_parallel must be a divisor of the 3 ranks started (P x D is the world size), got 2", "1, 3"],
    ),
    "more ranks than the stem has channels": (
        32,
        [*SYNTHETIC, "--conv", "sc", "--tp", "32"],
        ["tensor_parallel must be a divisor of the stem's 16 channels, got 32", "1, 2, 4, 8, 16"],
    ),
    "ranks zero": (2, [*SYNTHETIC, "--tp", "0"], ["tensor_parallel must be 1 or more, got 0"]),
    "ranks negative": (2, [*SYNTHETIC, "--tp", "-2"], ["tensor_parallel must be 1 or more, got -2"]),
    "model": (1, ["--dataset", "synthetic", "--model", "resnet50"], ["model must be", "wrn-28-10"]),
    "depth": (
        1,
        ["--dataset", "synthetic", "--model", "wrn-11-1"],
        ["model must be of a depth 6 u + 4, got 'wrn-11-1'", "10, 16, 22"],
    ),
    "width": (
        1,
        ["--dataset", "synthetic", "--model", "wrn-10-0"],
        ["model must be of a widening factor of 1 or more, got 'wrn-10-0'"],
    ),
    "convolution": (
        1,
        [*SYNTHETIC, "--conv", "gc2l"],
        ["conv must be one of sc, gc, gc-2l, gc-2l-proto, shuffle, flgc, bgc, got 'gc2l'"],
    ),
    "learned groups on two ranks": (
        2,
        [*SYNTHETIC, "--conv", "flgc", "--tp", "2"],
        ["tensor_parallel must be", "flgc", "learned"],
    ),
    "coarse kernel without a coarse level": (
        1,
        [*SYNTHETIC, "--conv", "gc", "--coarse-kernel-size", "1"],
        ["coarse_kernel_size=1", "'gc'", "gc-2l, gc-2l-proto"],
    ),
    "coarse kernel that has no centre": (
        1,
        [*SYNTHETIC, "--coarse-kernel-size", "2"],
        ["coarse_kernel_size must be odd, to be centred on kernels of 1 and 3, got 2"],
    ),
    "coarse initialization": (
        1,
        [*SYNTHETIC, "--coarse-init", "xavier"],
        ["coarse_init must be one of zero, scaled, he, got 'xavier'"],
    ),
    "initialization without a coarse level": (
        1,
        [*SYNTHETIC, "--conv", "shuffle", "--coarse-init", "he"],
        ["coarse_init='he'", "'shuffle'", "gc-2l, gc-2l-proto"],
    ),
    "no time between saves": (1, [*SYNTHETIC, "--save-every", "0"], ["--save-every", "minutes", "got 0"]),
    "no number between saves": (1, [*SYNTHETIC, "--save-every", "nan"], ["--save-every", "got nan"]),
    "no steps between saves": (
        1,
        [*SYNTHETIC, "--save-every-steps", "0"],
        ["--save-every-steps must be 1 or more, got 0"],
    ),
    "steps": (1, [*SYNTHETIC, "--limit-steps", "0"], ["--limit-steps must be 1 or more, got 0"]),
    "groups of MobileNetV2": (
        1,
        ["--dataset", "synthetic", "--model", "mobilenet_v2", "--groups", "16"],
        ["groups must be a divisor of features.2's 24 channels, got 16", "1, 2, 4, 8"],
    ),
    "ranks of MobileNetV2": (
        16,
        ["--dataset", "synthetic", "--model", "mobilenet_v2", "--conv", "sc", "--tp", "16"],
        ["tensor_parallel must be a divisor of features.2's 24 channels, got 16", "1, 2, 4, 8"],
    ),
    "coarse everywhere, in another model": (
        1,
        [*SYNTHETIC, "--coarse-everywhere"],
        ["coarse_everywhere", "wrn-10-1", "mobilenet_v2"],
    ),
    "data set": (1, ["--dataset", "mnist"], ["--dataset", "mnist", "digits, cifar10"]),
    "recipe": (1, [*SYNTHETIC, "--recipe", "slow"], ["--recipe", "'slow'", "cifar, imagenet, digits"]),
    "flag": (1, [*SYNTHETIC, "--grups", "4"], ["--grups", "--help"]),
    "flag cut short": (1, [*SYNTHETIC, "--epoch", "4"], ["--epoch", "--help"]),
    "flag without its value": (1, [*SYNTHETIC, "--epochs"], ["--epochs", "--help"]),
    "epochs": (1, [*SYNTHETIC, "--epochs", "-1"], ["--epochs must be 1 or more, got -1"]),
    "no epochs": (1, [*SYNTHETIC, "--epochs", "0"], ["--epochs must be 1 or more, got 0"]),
    "batch size": (1, [*SYNTHETIC, "--batch-size", "-8"], ["--batch-size must be 1 or more, got -8"]),
    "batch size does not divide": (2, [*SYNTHETIC, "--tp", "1", "--batch-size", "7"], ["7", "2 replicas", "of 2"]),
    "learning rate": (
        1,
        [*SYNTHETIC, "--learning-rate", "-0.1"],
        ["--learning-rate must be a positive number, got -0.1"],
    ),
    "learning rate nan": (
        1,
        [*SYNTHETIC, "--learning-rate", "nan"],
        ["--learning-rate must be a positive number, got nan"],
    ),
    "seed": (1, [*SYNTHETIC, "--seed", "-1"], ["--seed must be 0 or more, got -1"]),
    "workers": (1, [*SYNTHETIC, "--workers", "-1"], ["--workers must be 0 or more, got -1"]),
    "rank timeout": (1, [*SYNTHETIC, "--rank-timeout", "0"], ["--rank-timeout must be 1 to 604800 seconds, got 0.0"]),
    "rank timeout nan": (
        1,
        [*SYNTHETIC, "--rank-timeout", "nan"],
        ["--rank-timeout must be 1 to 604800 seconds, got nan"],
    ),
    "keep": (1, [*SYNTHETIC, "--keep", "0"], ["--keep must be 1 or more, got 0"]),
    "image size": (1, [*SYNTHETIC, "--image-size", "-8"], ["--image-size must be 8 or more, got -8"]),
    "classes": (1, [*SYNTHETIC, "--num-classes", "0"], ["num_classes must be 1 or more, got 0"]),
    "classes of a data set that knows": (
        1,
        ["--dataset", "digits", "--num-classes", "7"],
        ["--num-classes must be left out with --dataset digits, got 7"],
    ),
    "data folder not given": (1, ["--dataset", "cifar10"], ["--data-dir", "cifar10", "cifar-10-batches-py"]),
    "data folder missing": (
        1,
        ["--dataset", "imagefolder", "--data-dir", "{tmp}/none"],
        ["--data-dir", "{tmp}/none", "does not exist", "train/<class>"],
    ),
    "data folder of a name too long": (
        1,
        ["--dataset", "imagefolder", "--data-dir", "n" * 300],
        ["--data-dir", "nnn", "File name too long"],
    ),
    "data folder is a file": (
        1,
        ["--dataset", "cifar10", "--data-dir", "{tmp}/file"],
        ["--data-dir", "{tmp}/file", "cifar-10-batches-py"],
    ),
    "data folder laid out wrong": (
        1,
        ["--dataset", "imagefolder", "--data-dir", "{tmp}/flat"],
        ["--data-dir", "{tmp}/flat", "train/"],
    ),
    "data folder with a class missing": (
        1,
        ["--dataset", "imagefolder", "--data-dir", "{tmp}/uneven"],
        ["--data-dir", "{tmp}/uneven", "class dog", "test/"],
    ),
    "imagenet with two classes": (
        1,
        ["--dataset", "imagenet", "--data-dir", "{tmp}/even"],
        ["--data-dir", "{tmp}/even", "1000", "imagefolder"],
    ),
    "output folder holds a run": (
        1,
        [*SYNTHETIC, "--output-dir", "{tmp}/old"],
        ["--output-dir", "{tmp}/old", "--resume"],
    ),
    "output folder holds a run whose checkpoints are gone": (
        1,
        [*SYNTHETIC, "--output-dir", "{tmp}/emptied"],
        ["--output-dir", "{tmp}/emptied", "--resume"],
    ),
    "output folder is a file": (
        1,
        [*SYNTHETIC, "--output-dir", "{tmp}/file"],
        ["--output-dir", "{tmp}/file", "folder"],
    ),
    "output folder that is no text": (
        1,
        [*SYNTHETIC, "--output-dir", os.fsdecode(b"caf\xe9")],
        ["--output-dir must be a path in UTF-8, got 'caf\\udce9'"],
    ),
    "output folder in a file": (
        1,
        [*SYNTHETIC, "--output-dir", "{tmp}/file/run"],
        ["--output-dir", "{tmp}/file/run", "folder"],
    ),
    "nothing to resume": (1, [*SYNTHETIC, "--resume"], ["--resume", "{tmp}/run", "--output-dir"]),
    "resume from elsewhere": (
        1,
        [*SYNTHETIC, "--resume", "{tmp}/flat"],
        ["--resume", "a folder that holds one, got '{tmp}/flat'"],
    ),
    "resume a checkpoint that is gone": (
        1,
        [*SYNTHETIC, "--resume", "{tmp}/gone"],
        ["--resume", "shard-00-00.safetensors' is missing"],
    ),
    "resume another run": (
        1,
        [*SYNTHETIC, "--resume", "{tmp}/other"],
        ["--resume must be of a run with model='wrn-10-1', got 'wrn-16-1'", "'wrn-10-1'"],
    ),
    "resume what is not described": (
        1,
        [*SYNTHETIC, "--resume", "{tmp}/torn"],
        ["--resume", "{tmp}/torn", "checkpoint.json", "cannot be read"],
    ),
    "configuration missing": (
        1,
        [*SYNTHETIC, "--deepspeed_config", "{tmp}/none.json"],
        ["deepspeed_config must be a JSON file, got", "{tmp}/none.json"],
    ),
    "configuration is a folder": (1, [*SYNTHETIC, "--deepspeed_config", "{tmp}"], ["deepspeed_config", "{tmp}"]),
    "configuration is a pipe": (
        1,
        [*SYNTHETIC, "--deepspeed_config", "{tmp}/pipe"],
        ["deepspeed_config must be a JSON file, got", "{tmp}/pipe"],
    ),
    "configuration has no name": (
        1,
        [*SYNTHETIC, "--deepspeed_config", ""],
        ["deepspeed_config must be a JSON file, got ''"],
    ),
    "depth beyond reason": (
        1,
        ["--dataset", "synthetic", "--model", "wrn-1006-1"],
        ["model must be of a depth of 1000 or less, got 'wrn-1006-1'"],
    ),
    "width beyond reason": (
        1,
        ["--dataset", "synthetic", "--model", "wrn-10-10001"],
        ["model must be of a widening factor of 10000 or less, got 'wrn-10-10001'"],
    ),
    "width in other digits": (1, ["--dataset", "synthetic", "--model", "wrn-10-٣"], ["model must be", "wrn-10-٣"]),
    "classes beyond reason": (
        1,
        [*SYNTHETIC, "--num-classes", "1000001"],
        ["num_classes must be 1000000 or less, got 1000001"],
    ),
    "coarse kernel beyond reason": (
        1,
        [*SYNTHETIC, "--coarse-kernel-size", "257"],
        ["coarse_kernel_size must be 255 or less, got 257"],
    ),
    "seed that torch cannot hold": (
        1,
        [*SYNTHETIC, "--seed", str(2**63)],
        [f"--seed must be {2**63 - 1} or less, got {2**63}"],
    ),
    "epochs beyond reason": (1, [*SYNTHETIC, "--epochs", "9" * 400], ["--epochs must be 1000000000 or less, got"]),
    "workers beyond reason": (1, [*SYNTHETIC, "--workers", "100000"], ["--workers must be 256 or less, got 100000"]),
    "image size beyond reason": (
        1,
        [*SYNTHETIC, "--image-size", "99999"],
        ["--image-size must be 4096 or less, got 99999"],
    ),
    "rank timeout beyond reason": (
        1,
        [*SYNTHETIC, "--rank-timeout", "1e300"],
        ["--rank-timeout must be 1 to 604800 seconds, got 1e+300"],
    ),
    "number too long to be one": (1, [*SYNTHETIC, "--tp", "9" * 5000], ["--tp", "int"]),
    "a line's end in a value": (1, ["--dataset", "di\ngits"], ["--dataset must be"]),
    "a line's end in a flag": (1, [*SYNTHETIC, "--a\nb"], ["--a\\nb", "--help"]),
}

# name: (ranks started, the configuration's text, more arguments, what the line holds)
CONFIGURATIONS: dict[str, tuple[int, str, list[str], list[str]]] = {
    "malformed": (1, '{"zero_optimization": {"stage": 1}', [], ["deepspeed_config must be a JSON file, got"]),
    "array": (1, "[1, 2]", [], ["deepspeed_config must hold a JSON object, got none"]),
    "empty": (1, "", [], ["deepspeed_config must hold a JSON object, got none"]),
    "only a comment": (1, "# nothing\n", [], ["deepspeed_config must hold a JSON object, got none"]),
    "not text": (1, "\udcff\udcfe", [], ["deepspeed_config must be a JSON file, got"]),
    "key twice": (1, '{"steps_per_print": 1, "steps_per_print": 2}', [], ["'steps_per_print'", "twice"]),
    "stage": (
        1,
        '{"zero_optimization": {"stage": 7}}',
        [],
        ["zero_optimization.stage in the DeepSpeed configuration must be 0, 1, 2 or 3, got 7"],
    ),
    "stage as text": (
        1,
        '{"zero_optimization": {"stage": "two"}}',
        [],
        ['zero_optimization.stage in the DeepSpeed configuration must be 0, 1, 2 or 3, got "two"'],
    ),
    "stage outside its section": (
        1,
        '{"zero_optimization": true}',
        [],
        ["zero_optimization.stage in the DeepSpeed configuration must be 0, 1, 2 or 3, got true"],
    ),
    "ranks as text": (
        2,
        '{"tensor_parallel": {"autotp_size": "two"}}',
        [],
        ['tensor_parallel.autotp_size in the DeepSpeed configuration must be 1 or more, got "two"'],
    ),
    "ranks negative": (
        2,
        '{"tensor_parallel": {"autotp_size": -2}}',
        [],
        ["tensor_parallel.autotp_size in the DeepSpeed configuration must be 1 or more, got -2"],
    ),
    "ranks outside their section": (
        2,
        '{"tensor_parallel": 2}',
        [],
        ['tensor_parallel in the DeepSpeed configuration must be {"autotp_size": P}, got 2'],
    ),
    "ranks do not divide the world": (
        3,
        '{"tensor_parallel": {"autotp_size": 2}}',
        [],
        ["tensor_parallel must be a divisor of the 3 ranks started (P x D is the world size), got 2", "1, 3"],
    ),
    "ranks contradict": (
        2,
        '{"tensor_parallel": {"autotp_size": 2}}',
        ["--tp", "1"],
        ["--tp must be tensor_parallel.autotp_size of the DeepSpeed configuration, 2, got 1"],
    ),
    "monitor that is not installed": (
        1,
        '{"comet": {"enabled": true}}',
        [],
        ["comet in the DeepSpeed configuration needs comet_ml, which is not installed; pip install comet_ml"],
    ),
    "name mistyped": (
        1,
        '{"zero_optimisation": {"stage": 2}}',
        [],
        ["must have no 'zero_optimisation', which means nothing; use zero_optimization"],
    ),
    "another name mistyped": (1, '{"gradient_cliping": 1.0}', [], ["'gradient_cliping'", "use gradient_clipping"]),
    "switch as text": (
        1,
        '{"bf16": {"enabled": "no"}}',
        [],
        ['bf16.enabled in the DeepSpeed configuration must be true or false, got "no"; write it without quotes'],
    ),
    "batch contradicts": (
        1,
        '{"train_batch_size": 32}',
        ["--batch-size", "64"],
        ["--batch-size must be the batch that the DeepSpeed configuration sets, 32, got 64"],
    ),
    "batch as text": (
        1,
        '{"train_batch_size": "many"}',
        [],
        ['train_batch_size in the DeepSpeed configuration must be 1 or more, got "many"', "int"],
    ),
    "batch negative": (
        1,
        '{"train_batch_size": -32}',
        [],
        ["train_batch_size in the DeepSpeed configuration must be 1 or more, got -32"],
    ),
    "rate contradicts": (
        1,
        '{"optimizer": {"type": "SGD", "params": {"lr": 0.2}}}',
        ["--learning-rate", "0.1"],
        ["--learning-rate must be optimizer.params.lr of the DeepSpeed configuration, 0.2, got 0.1"],
    ),
    "rate missing": (
        1,
        '{"optimizer": {"type": "SGD"}}',
        [],
        ["optimizer in the DeepSpeed configuration must be", "lr"],
    ),
    "rate infinite": (
        1,
        '{"optimizer": {"type": "SGD", "params": {"lr": 1e999}}}',
        [],
        ["deepspeed_config must be a JSON file, got", "infinity"],
    ),
    "clipping as text": (
        1,
        '{"gradient_clipping": "auto"}',
        [],
        ['gradient_clipping in the DeepSpeed configuration must be 0 or more, got "auto"'],
    ),
    "steps between prints": (
        1,
        '{"steps_per_print": 0}',
        [],
        ["steps_per_print in the DeepSpeed configuration must be 1 or more, got 0"],
    ),
    "rate as text": (
        1,
        '{"optimizer": {"type": "SGD", "params": {"lr": "0.1"}}}',
        [],
        ['optimizer.params.lr in the DeepSpeed configuration must be a positive number, got "0.1"'],
    ),
    "rate negative": (
        1,
        '{"optimizer": {"type": "SGD", "params": {"lr": -0.1}}}',
        [],
        ["optimizer.params.lr in the DeepSpeed configuration must be a positive number, got -0.1"],
    ),
    "rate beyond a float": (
        1,
        f'{{"optimizer": {{"type": "SGD", "params": {{"lr": {10**400}}}}}}}',
        [],
        ["optimizer.params.lr in the DeepSpeed configuration must be a positive number, got"],
    ),
    "optimizer without a type": (
        1,
        '{"optimizer": {"params": {"lr": 0.1}}}',
        [],
        ["optimizer in the DeepSpeed configuration must be", "type"],
    ),
    "too deep": (1, "[" * 100_000, [], ["deepspeed_config must be a JSON file, got"]),
    "a number too long": (
        1,
        '{"train_batch_size": ' + "9" * 5000 + "}",
        [],
        ["deepspeed_config must be a JSON file, got"],
    ),
    "a section of thousands": (
        1,
        '{"tensor_parallel": [' + "1, " * 5000 + "1]}",
        [],
        ['tensor_parallel in the DeepSpeed configuration must be {"autotp_size": P}, got [1,', "..."],
    ),
    "key twice, with a line's end": (1, '{"a\\nb": 1, "a\\nb": 2}', [], ["'a\\nb'", "twice"]),
    "optimizer is a name": (
        1,
        '{"optimizer": "SGD"}',
        [],
        ["optimizer in the DeepSpeed configuration must be", "SGD", "params"],
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with what the mistakes need."""
    (tmp_path / "file").write_text("not a folder")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "0.png").touch()
    for image in ("train/cat/0.png", "test/cat/0.png"):
        for kind in ("uneven", "even"):
            path = tmp_path / kind / image
            path.parent.mkdir(parents=True)
            path.touch()
    (tmp_path / "uneven/train/dog").mkdir()
    (tmp_path / "uneven/train/dog/0.png").touch()
    (tmp_path / "even/val").mkdir()
    (tmp_path / "even/val/cat").mkdir()
    (tmp_path / "even/val/cat/0.png").touch()
    (tmp_path / "emptied/checkpoints").mkdir(parents=True)
    (tmp_path / "emptied/checkpoints/latest").write_text("epoch-1\n")
    for run in ("old", "emptied"):
        (tmp_path / run).mkdir(exist_ok=True)
        (tmp_path / run / "metrics.jsonl").write_text('{"epoch": 1}\n')
    for run in ("gone", "other", "torn"):
        checkpoint = tmp_path / run / "checkpoints" / "epoch-3"
        checkpoint.mkdir(parents=True)
        (checkpoint.parent / "latest").write_text("epoch-3\n")
        shard = checkpoint / "shard-00-00.safetensors"
        shard.write_bytes(b"weights")
        state = {"run": {**RUN, "model": "wrn-16-1"}, "num_classes": 10, "progress": PROGRESS}
        described = {"format": 1, "files": {shard.name: sealed(str(shard))}, "client_state": state}
        (checkpoint / "checkpoint.json").write_text(description_text(described)[: 30 if run == "torn" else None])
        if run == "gone":
            shard.unlink()
    return tmp_path


def _not_refused() -> None:
    raise AssertionError("the mistake went past the checks: torch and deepspeed were about to be loaded")


def _refused(folder: Path, monkeypatch: pytest.MonkeyPatch, world: int, rank: int, arguments: list[str]) -> None:
    """Runs ``train`` as one rank of a launch; asserts that it ends with 2, and leaves no file."""
    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("LOCAL_RANK", str(rank))
    monkeypatch.chdir(folder)
    monkeypatch.setattr("tlgc_mp.engine.initialization.quiet_start", _not_refused)
    before = sorted(folder.rglob("*"))
    if "--output-dir" not in arguments:
        arguments = [*arguments, "--output-dir", str(folder / "run")]
    assert main(["train", "--epochs", "1", *arguments]) == 2
    assert sorted(folder.rglob("*")) == before


def assert_one_line(captured: tuple[str, str], parts: list[str]) -> None:
    out, err = captured
    assert out == ""
    assert err.endswith("\n") and len(err.splitlines()) == 1, err
    assert err.startswith("tlgc-mp: error: "), err
    assert [part for part in parts if part not in err] == [], err


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistake_in_the_arguments(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    world, arguments, parts = MISTAKES[mistake]
    arguments, parts = ([text.replace("{tmp}", str(folder)) for text in texts] for texts in (arguments, parts))

    _refused(folder, monkeypatch, world, 0, arguments)
    assert_one_line(capsys.readouterr(), parts)

    _refused(folder, monkeypatch, max(2, world), 1, arguments if world > 1 else [*arguments, "--tp", "1"])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("mistake", CONFIGURATIONS)
def test_mistake_in_the_configuration(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], mistake: str
) -> None:
    world, text, more, parts = CONFIGURATIONS[mistake]
    config = folder / "config.json"
    config.write_bytes(text.encode(errors="surrogateescape"))

    _refused(folder, monkeypatch, world, 0, [*SYNTHETIC, "--deepspeed_config", str(config), *more])
    assert_one_line(capsys.readouterr(), [part.replace("{config}", str(config)) for part in parts])


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["trian"], ["'trian'", "train", "params"]),
        (["params", "--groups", "5"], ["groups must be a divisor of the stem's 16 channels, got 5", "1, 2, 4, 8, 16"]),
        (
            ["params", "--tp", "3"],
            ["tensor_parallel must be a divisor of the stem's 16 channels, got 3", "1, 2, 4, 8, 16"],
        ),
        (
            ["params", "--groups", "2", "--tp", "4"],
            ["tensor_parallel must be a divisor of groups=2, got 4; use one of 1, 2"],
        ),
    ],
)
def test_mistake_in_the_command(capsys: pytest.CaptureFixture[str], arguments: list[str], parts: list[str]) -> None:
    assert main(arguments) == 2
    assert_one_line(capsys.readouterr(), parts)
