"""The options of ``tlgc-mp train``: declared, read from a file where one is named, and written where the run is.

Loads no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from tlgc_mp.checkpoint.folder import BEST, CHECKPOINTS, DESCRIPTION, LATEST
from tlgc_mp.data.catalog import DATASETS
from tlgc_mp.engine.config import read_config
from tlgc_mp.errors import UsageError, shown
from tlgc_mp.host import replace_file
from tlgc_mp.models.names import COARSE_INITS, CONVOLUTIONS, IMAGENET_WIDE_RESNET, MOBILENET_V2
from tlgc_mp.training.changes import RESUME_AUTO
from tlgc_mp.training.recipes import OPTIMIZERS, RECIPES, SCHEDULES
from tlgc_mp.training.runs import OPTIONS
from tlgc_mp.training.settings import output_folder

_DATA = ("dataset", "data_dir", "val_split", "image_size", "num_classes", "seed")
_OF_A_START = ("command", "config", "dry_run", "local_rank", "output_dir", "profile", "resume", "run")
"""What is said at each start, and stands in no file that a run writes."""


class Parser(argparse.ArgumentParser):
    """An argument parser that raises what it finds wrong, instead of printing a usage text on every rank, and knows
    which flag was meant. Without a word where it has commands, it prints its help."""

    has_commands = False

    def add_subparsers(self, **options: Any) -> Any:
        self.has_commands = True
        return super().add_subparsers(**options)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        if not words and self.has_commands:
            self.print_help()
            self.exit()
        options, further = super().parse_known_args(words, namespace)
        flags = [word.partition("=")[0] for word in further if word.startswith("--") and word != "--"]
        known = re.findall(r"--[\w-]+", self.format_help()) if flags else []
        for flag in flags:
            near = difflib.get_close_matches(flag, known, n=1)
            if near:
                self.error(f"unrecognized arguments: {' '.join(further)}; {near[0]} may be meant")
        return options, further


def add_train_parser(commands: Any, run: Callable[..., int]) -> None:
    """Adds ``train``, which calls ``run``, to the subparsers ``commands``."""
    train = commands.add_parser(
        "train",
        help="train a model, on one process or under deepspeed, mpirun or torchrun",
        description="Train a model. The same command runs in one process, and under deepspeed, mpirun and torchrun.",
        allow_abbrev=False,
    )
    add_model_arguments(train)
    train.add_argument("--dataset", default="cifar10", help=f"{', '.join(DATASETS)} (default: %(default)s)")
    train.add_argument("--data-dir", metavar="DIR", help="where the images are; CIFAR is downloaded there if missing")
    train.add_argument("--val-split", metavar="NAME", help="folder in DIR to test on (default: test, else val)")
    train.add_argument("--image-size", type=int, metavar="PIXELS", help="for imagefolder and synthetic")
    train.add_argument("--recipe", help=f"{', '.join(RECIPES)} (default: by data set): epochs, batch, rate and decay")
    train.add_argument("--epochs", type=int, help="default: the recipe's; its milestones move along")
    train.add_argument(
        "--limit-steps",
        type=int,
        metavar="K",
        help="end each epoch after K steps, and its evaluation after K batches, to try a run (default: no limit)",
    )
    train.add_argument(
        "--log-interval",
        type=int,
        default=50,
        metavar="K",
        help="report loss, rate, speed and remaining time every K steps (default: %(default)s)",
    )
    train.add_argument("--batch-size", type=int, help="samples a step over all replicas (default: the recipe's)")
    train.add_argument(
        "--learning-rate",
        "--lr",
        type=float,
        metavar="RATE",
        help="the initial one, the largest of onecycle (default: the recipe's; 0.001 for adamw)",
    )
    train.add_argument("--optimizer", metavar="NAME", help=f"{', '.join(OPTIMIZERS)} (default: the recipe's, sgd)")
    train.add_argument("--momentum", type=float, metavar="M", help="of sgd (default: the recipe's, 0.9)")
    train.add_argument("--weight-decay", type=float, metavar="D", help="default: the recipe's; 0.01 for adamw")
    train.add_argument("--schedule", metavar="NAME", help=f"{', '.join(SCHEDULES)} (default: the recipe's, step)")
    train.add_argument(
        "--warmup-epochs", type=int, metavar="K", help="in which the rate rises to the initial one (default: none)"
    )
    train.add_argument("--label-smoothing", type=float, metavar="SHARE", help="default: 0")
    train.add_argument("--mixup", type=float, metavar="ALPHA", help="mix images in pairs (default: not)")
    train.add_argument(
        "--ema",
        nargs="?",
        const=0.999,
        type=float,
        metavar="DECAY",
        help="evaluate and export a moving average of the weights (default: not; 0.999 where no DECAY is given)",
    )
    train.add_argument(
        "--tp",
        type=int,
        metavar="P",
        help="tensor-parallel ranks a replica (default: as many of a host as share the groups)",
    )
    train.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    train.add_argument("--workers", type=int, metavar="W", help="data worker processes a rank (default: by data set)")
    train.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="residual units keep only their input for backward, and are computed again there",
    )
    train.add_argument(
        "--config",
        metavar="YAML",
        help="a file of these options, as run.yaml in a run's output folder is one: flags win over it",
    )
    train.add_argument(
        "--output-dir",
        metavar="DIR",
        help="default: runs/MODEL-CONV-GROUPS-DATASET, with a folder's name and a digest of its path for imagefolder",
    )
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="DIR",
        help="go on from the newest checkpoint of the run in DIR (default: in the output folder), with its options, as "
        "run.yaml there holds them; flags win, and may change epochs, batch and rate; with `auto`, in the output "
        "folder where there is one, and else begin",
    )
    train.add_argument(
        "--init-from",
        metavar="PATH",
        help="begin with the weights of an exported file or of a run, all but a last layer that does not fit",
    )
    train.add_argument(
        "--keep",
        type=int,
        default=2,
        metavar="K",
        help="checkpoints to keep: the newest ones, and the best (default: %(default)s)",
    )
    train.add_argument(
        "--save-every",
        type=float,
        metavar="MINUTES",
        help="save when so long has passed since the last checkpoint (default: at the end of an epoch only)",
    )
    train.add_argument("--save-every-steps", type=int, metavar="K", help="save after each K steps of an epoch, too")
    train.add_argument(
        "--blocking-save",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="write a checkpoint before training goes on, which saves the copy that is written beside it otherwise",
    )
    train.add_argument(
        "--rank-timeout",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="end the run when a rank has given no sign of life for so long (default: %(default)g)",
    )
    train.add_argument(
        "--deepspeed_config", "--deepspeed-config", metavar="JSON", help="a DeepSpeed configuration (default: ZeRO 1)"
    )
    train.add_argument(
        "--profile",
        nargs="?",
        const=3,
        type=int,
        metavar="K",
        help="write a trace of K steps, the third and on (default: 3), by torch's profiler to DIR/profile",
    )
    train.add_argument(
        "--dry-run",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="check everything and say what would be trained, and train and write nothing",
    )
    train.set_defaults(run=run)


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="wrn-28-10",
        help=f"wrn-<depth>-<width>, {IMAGENET_WIDE_RESNET}, {MOBILENET_V2}, torchvision:<name> or timm:<name> "
        "(default: %(default)s)",
    )
    parser.add_argument("--conv", default="gc-2l", help=f"{', '.join(CONVOLUTIONS)} (default: %(default)s)")
    parser.add_argument("--groups", type=int, help="N (default: 4; 1 for sc)")
    parser.add_argument("--num-classes", type=int, metavar="C", help="default: the data set's, or 10 or 1000")
    parser.add_argument(
        "--coarse-everywhere",
        action=argparse.BooleanOptionalAction,
        default=False,
        help=f"a coarse level in the last 1x1 convolution of {MOBILENET_V2} too, which is a group convolution else",
    )
    parser.add_argument(
        "--coarse-kernel-size", type=int, metavar="D0", help="of the restriction (default: that of its convolution)"
    )
    parser.add_argument(
        "--coarse-init",
        default=COARSE_INITS[0],
        help=f"{', '.join(COARSE_INITS)}: initial weights (default: %(default)s)",
    )


def parse(parser: Parser, words: Sequence[str], world: int) -> Any:
    """The options in ``words``; those of ``train`` completed from the file that --config names, and where a run is
    resumed from the one that it has written. Flags win over --config, and that over the run's own.

    Args:
        world: how many ranks there are.
    """
    options = parser.parse_args(words)
    if options.command in ("train", "params") and options.groups is None:
        options.groups = default_groups(options.conv)
    if options.command != "train":
        return options
    words, at = list(words), list(words).index("train") + 1
    further: list[str] = []
    embedded = None
    for path in (options.config, _of_run(options)):
        if path is None:
            continue
        entries = _read(path)
        if path != options.config and world % max(1, _as_count(entries.get("tp"))):
            entries.pop("tp")  # it may go on over another number of ranks
        config = entries.pop("deepspeed_config", None)
        embedded = config if embedded is None else embedded
        further = [*_as_words(parser, entries, path), *further]
        options = parser.parse_args([*words[:at], *further, *words[at:]])
        if options.groups is None:
            options.groups = default_groups(options.conv)
    if options.deepspeed_config is None:
        options.deepspeed_config = embedded
    return options


def default_groups(conv: str) -> int:
    return 1 if conv == "sc" else 4


def write(options: Any, output_dir: str) -> None:
    """Writes the options of a run where ``--config`` and ``--resume`` find them."""
    import yaml

    entries = {key: value for key, value in sorted(vars(options).items()) if key not in _OF_A_START}
    entries = {key: value for key, value in entries.items() if value is not None}
    if entries["groups"] == default_groups(options.conv):
        del entries["groups"]  # so that --conv sc can win over the file
    for key in ("data_dir", "init_from"):
        if key in entries:
            entries[key] = os.path.abspath(entries[key])
    if "deepspeed_config" in entries:
        entries["deepspeed_config"] = read_config(entries["deepspeed_config"])
    replace_file(os.path.join(output_dir, OPTIONS), yaml.safe_dump(entries, sort_keys=False))


def _of_run(options: Any) -> str | None:
    """The file of the run that is resumed, where there is one."""
    if options.resume is None:
        return None
    return _beside(output_folder(options) if options.resume in ("", RESUME_AUTO) else options.resume)


def data_of_run(path: str) -> dict[str, Any]:
    """What the run in ``path``, or that of the checkpoint ``path``, was trained on, by the names of flags."""
    file = _beside(path)
    entries = {} if file is None else _read(file)
    return {key: entries[key] for key in _DATA if key in entries}


def _beside(path: str) -> str | None:
    """The file of options of the run in ``path``, or of that whose checkpoint it is, where there is one."""
    folder = os.path.abspath(path)
    if os.path.isfile(os.path.join(folder, DESCRIPTION)) or os.path.basename(folder) in (BEST, LATEST):
        folder = os.path.dirname(folder)
    if os.path.basename(folder) == CHECKPOINTS:
        folder = os.path.dirname(folder)
    path = os.path.join(folder, OPTIONS)
    return path if os.path.isfile(path) else None


def _read(path: str) -> dict[str, Any]:
    """The entries of a file of options, by the names of the flags without dashes."""
    import yaml

    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(2, "it is no file")
        with open(path, encoding="utf-8") as file:
            entries = yaml.safe_load(file)
    except OSError as error:
        raise UsageError(f"--config must be a file of options, got {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise UsageError(f"{path!r} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise UsageError(f"{path!r} must hold options, as `epochs: 2`, a line each, got {shown(entries)}")
    return {key.replace("-", "_"): value for key, value in entries.items() if value is not None}


def _as_words(parser: Parser, entries: dict[str, Any], path: str) -> list[str]:
    """Entries of a file as flags, each of which was tried."""
    words = []
    for key, value in entries.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, dict | list):
            raise UsageError(f"{path!r}: {key} must be a number, text, true or false, got {shown(value)}")
        if key in _OF_A_START and key != "output_dir":
            raise UsageError(f"{path!r}: {key} must be left out: give it as a flag")
        word = f"--no-{flag[2:]}" if value is False else flag if value is True else f"{flag}={value}"
        try:
            parser.parse_args(["train", word])
        except UsageError as error:
            raise UsageError(f"{path!r}: {error}") from None
        words.append(word)
    return words


def _as_count(value: Any) -> int:
    return value if isinstance(value, int) else 1
