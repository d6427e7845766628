"""The options of ``tlgc-mp train``: declared, read from a file where one is named, and written where the run is.

Loads no torch.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import NoReturn, TypeAlias, TypedDict, cast

from tlgc_mp.checkpoint.folder import BEST, CHECKPOINTS, DESCRIPTION, LATEST
from tlgc_mp.engine.config import read_config
from tlgc_mp.errors import UsageError, must_be, shown
from tlgc_mp.host import replace_file
from tlgc_mp.json_types import JsonObject
from tlgc_mp.parallel.topology import Launch
from tlgc_mp.training.changes import RESUME_AUTO
from tlgc_mp.training.options import EACH_START, KEPT, ModelOptions, TrainOptions, flags_of
from tlgc_mp.training.runs import OPTIONS
from tlgc_mp.training.settings import output_folder

Commands: TypeAlias = "argparse._SubParsersAction[Parser]"


class DataOfRun(TypedDict, total=False):
    """What a run was trained on, as far as its file of options says."""

    dataset: str
    data_dir: str
    val_split: str
    image_size: int
    num_classes: int
    seed: int


class Parser(argparse.ArgumentParser):
    """An argument parser that raises what it finds wrong, instead of printing a usage text on every rank, and knows
    which flag was meant. Without a word where it has commands, it prints its help."""

    has_commands = False

    def add_subparsers(self, **options: object) -> Commands:  # type: ignore[override]
        self.has_commands = True
        return super().add_subparsers(**options)  # type: ignore[call-overload,no-any-return]

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
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


def add_train_parser(commands: Commands, run: Callable[..., int]) -> None:
    """Adds ``train``, which calls ``run``, to the subparsers ``commands``."""
    train = commands.add_parser(
        "train",
        help="train a model, on one process or under deepspeed, mpirun or torchrun",
        description="Train a model. The same command runs in one process, and under deepspeed, mpirun and torchrun.",
        allow_abbrev=False,
    )
    add_options(train, TrainOptions)
    train.set_defaults(run=run)


def check_alone(command: str, launch: Launch) -> None:
    """Raises :class:`UsageError` where a launcher has started several ranks of a command that starts its own, or needs
    none."""
    if launch.world > 1:
        raise UsageError(f"{command} must be started once, without a launcher, got {launch.world} ranks")


_NUMBERS = {"int": int, "float": float}
_VALUES = {option.name for option in fields(TrainOptions) if option.type != "bool"}
"""The options that are no switches."""


def add_options(parser: argparse.ArgumentParser, kind: type[ModelOptions]) -> None:
    """Adds the flags of a class of options."""
    for option in fields(kind):
        argument = dict(option.metadata["argument"])
        declared = str(option.type).partition(" ")[0]
        if declared == "bool":
            argument["action"] = argparse.BooleanOptionalAction
        elif declared in _NUMBERS:
            argument["type"] = _NUMBERS[declared]
        parser.add_argument(*flags_of(option), default=option.default, **argument)


def parse(parser: Parser, words: Sequence[str], world: int) -> Namespace:
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


def write(options: Namespace, output_dir: str) -> None:
    """Writes the options of a run where ``--config`` and ``--resume`` find them."""
    import yaml

    entries = {key: value for key in KEPT if (value := getattr(options, key)) is not None}
    if entries["groups"] == default_groups(options.conv):
        del entries["groups"]  # so that --conv sc can win over the file
    for key in ("data_dir", "init_from"):
        if key in entries:
            entries[key] = os.path.abspath(entries[key])
    if "deepspeed_config" in entries:
        entries["deepspeed_config"] = read_config(entries["deepspeed_config"])
    replace_file(os.path.join(output_dir, OPTIONS), yaml.safe_dump(entries, sort_keys=False))


def _of_run(options: Namespace) -> str | None:
    """The file of the run that is resumed, where there is one."""
    if options.resume is None:
        return None
    return _beside(output_folder(options) if options.resume in ("", RESUME_AUTO) else options.resume)


def data_of_run(path: str) -> DataOfRun:
    """What the run in ``path``, or that of the checkpoint ``path``, was trained on, by the names of flags."""
    file = _beside(path)
    entries = {} if file is None else _read(file)
    return cast(DataOfRun, {key: entries[key] for key in DataOfRun.__optional_keys__ if key in entries})


def _beside(path: str) -> str | None:
    """The file of options of the run in ``path``, or of that whose checkpoint it is, where there is one."""
    folder = os.path.abspath(path)
    if os.path.isfile(os.path.join(folder, DESCRIPTION)) or os.path.basename(folder) in (BEST, LATEST):
        folder = os.path.dirname(folder)
    if os.path.basename(folder) == CHECKPOINTS:
        folder = os.path.dirname(folder)
    path = os.path.join(folder, OPTIONS)
    return path if os.path.isfile(path) else None


def _read(path: str) -> JsonObject:
    """The entries of a file of options, by the names of the flags without dashes."""
    import yaml

    try:
        if not os.path.isfile(path):
            raise FileNotFoundError(2, "it is no file")
        with open(path, encoding="utf-8") as file:
            text = file.read()
        entries, read = yaml.safe_load(text), yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config must be a file of options, got {path!r}: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise must_be("--config", "a YAML file", path, note=f": {' '.join(str(error).split())}") from None
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in entries):
        raise UsageError(f"{path!r} must hold options, as `epochs: 2`, a line each, got {shown(entries)}")
    keys = [key.value.replace("-", "_") for key, _ in read.value]
    if twice := [key for key in keys if keys.count(key) > 1]:  # YAML takes the last
        raise UsageError(f"{path!r} must have each option once, got {twice[0]} {len(twice)} times; keep one")
    return {key.replace("-", "_"): value for key, value in entries.items() if value is not None}


def _as_words(parser: Parser, entries: JsonObject, path: str) -> list[str]:
    """Entries of a file as flags, each of which was tried."""
    words = []
    for key, value in entries.items():
        flag = "--" + key.replace("_", "-")
        if isinstance(value, dict | list):
            raise UsageError(f"{path!r}: {key} must be a number, text, true or false, got {shown(value)}")
        if key in EACH_START and key != "output_dir":
            raise UsageError(f"{path!r}: {key} must be left out, got {shown(value)}; give it as a flag")
        if value is False and key in _VALUES:
            raise UsageError(f"{path!r}: {key} must be left out where it is not wanted, got false; remove the line")
        word = f"--no-{flag[2:]}" if value is False else flag if value is True else f"{flag}={value}"
        try:
            parser.parse_args(["train", word])
        except UsageError as error:
            raise UsageError(f"{path!r}: {error}") from None
        words.append(word)
    return words


def _as_count(value: object) -> int:
    return value if isinstance(value, int) else 1
