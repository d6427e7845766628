"""What ``tlgc-mp train`` is told, each option once: flags, help, checks and a run's description come from it.

Loads no torch.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

from tlgc_mp.data.catalog import DATASETS
from tlgc_mp.errors import UsageError, must_be, one_of
from tlgc_mp.json_types import JsonObject
from tlgc_mp.models.names import (
    COARSE_INITS,
    CONVOLUTIONS,
    IMAGENET_WIDE_RESNET,
    MOBILENET_V2,
    ModelArguments,
    check_coarse_level,
    check_model,
    coarse_level_of,
)
from tlgc_mp.training.recipes import OPTIMIZERS, RECIPES, SCHEDULES

if TYPE_CHECKING:
    from tlgc_mp.training.settings import TrainSettings


LARGEST_WORKERS = 256
_LARGEST_COUNT = 1_000_000_000
_COUNT = (1, _LARGEST_COUNT)
_LONGEST_WAIT = 604_800
"""A week, in seconds."""


Fits: TypeAlias = Callable[[Any], bool]


class _Check(TypedDict):
    """Whether a value can work, and what is said where it cannot."""

    fits: Fits
    refusal: str


def _option(
    help: str,
    *flags: str,
    default: object = None,
    described: bool = False,
    each_start: bool = False,
    bounds: tuple[int, int] | None = None,
    fits: Fits | None = None,
    refusal: str = "",
    **argument: object,
) -> Any:
    """A field that is an option.

    Args:
        flags: where it is not the name of the field alone.
        described: whether it is a part of what a run is.
        each_start: whether it is said at each start, and stands in no file that a run writes.
        bounds: of a count.
        fits: of another value, whether it can work; ``refusal`` says of a ``flag`` and its ``value`` that it cannot.
        argument: what ``add_argument`` takes.
    """
    metadata = {"flags": flags, "described": described, "each_start": each_start, "bounds": bounds, "fits": fits}
    return field(default=default, metadata={**metadata, "refusal": refusal, "argument": {"help": help, **argument}})


def _must(need: str, fits: Fits) -> _Check:
    """A check by ``fits``: ``0 or more; use 5, say``."""
    need, _, use = need.partition("; ")
    return {"fits": fits, "refusal": f"{{flag}} must be {need}, got {{value}}; {use}"}


def _chosen(known: tuple[str, ...]) -> _Check:
    return {"fits": lambda value: value in known, "refusal": f"{{flag}} must be {one_of(known)}, got {{value!r}}"}


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which network it is."""

    model: str = _option(
        f"wrn-<depth>-<width>, {IMAGENET_WIDE_RESNET}, {MOBILENET_V2}, torchvision:<name> or timm:<name> "
        "(default: %(default)s)",
        default="wrn-28-10",
        described=True,
    )
    conv: str = _option(f"{', '.join(CONVOLUTIONS)} (default: %(default)s)", default="gc-2l", described=True)
    groups: int | None = _option("N (default: 4; 1 for sc)", described=True)
    num_classes: int | None = _option("default: the data set's, or 10 or 1000", metavar="C")
    coarse_everywhere: bool = _option(
        f"a coarse level in the last 1x1 convolution of {MOBILENET_V2} too, which is a group convolution else",
        default=False,
        described=True,
    )
    coarse_kernel_size: int | None = _option(
        "of the restriction (default: that of its convolution)", described=True, metavar="D0"
    )
    coarse_init: str = _option(
        f"{', '.join(COARSE_INITS)}: initial weights (default: %(default)s)", default=COARSE_INITS[0], described=True
    )
    coarse_channels: int = _option(
        "representatives of a group that the others see (default: %(default)s)", default=1, described=True, metavar="R"
    )
    coarse_sum: bool = _option(
        "sum the representatives of all groups: R maps are shared, whatever N is", default=False, described=True
    )


@dataclass(frozen=True, kw_only=True)
class TrainOptions(ModelOptions):
    """A training run, as far as it was asked for."""

    dataset: str = _option(f"{', '.join(DATASETS)} (default: %(default)s)", default="cifar10", described=True)
    data_dir: str | None = _option(
        "where the images are; CIFAR is downloaded there if missing", described=True, metavar="DIR"
    )
    val_split: str | None = _option(
        "folder in DIR to test on (default: test, else val)", described=True, metavar="NAME"
    )
    image_size: int | None = _option(
        "for imagefolder and synthetic", described=True, bounds=(8, 4096), metavar="PIXELS"
    )
    recipe: str | None = _option(
        f"{', '.join(RECIPES)} (default: by data set): epochs, batch, rate and decay", described=True
    )
    epochs: int | None = _option("default: the recipe's; its milestones move along", described=True, bounds=_COUNT)
    limit_steps: int | None = _option(
        "end each epoch after K steps, and its evaluation after K batches, to try a run (default: no limit)",
        described=True,
        bounds=_COUNT,
        metavar="K",
    )
    log_interval: int = _option(
        "report loss, rate, speed and remaining time every K steps (default: %(default)s)",
        default=50,
        bounds=_COUNT,
        metavar="K",
    )
    batch_size: int | None = _option(
        "samples a step over all replicas (default: the recipe's)", described=True, bounds=_COUNT
    )
    learning_rate: float | None = _option(
        "the initial one, the largest of onecycle (default: the recipe's; 0.001 for adamw)",
        *("--learning-rate", "--lr"),
        described=True,
        **_must("a positive number; use e.g. 0.1", lambda value: 0 < value < float("inf")),
        metavar="RATE",
    )
    optimizer: str | None = _option(
        f"{', '.join(OPTIMIZERS)} (default: the recipe's, sgd)", **_chosen(OPTIMIZERS), metavar="NAME"
    )
    momentum: float | None = _option(
        "of sgd (default: the recipe's, 0.9)",
        **_must("0 or more and less than 1; use e.g. 0.9", lambda value: 0 <= value < 1),
        metavar="M",
    )
    weight_decay: float | None = _option(
        "default: the recipe's; 0.01 for adamw",
        **_must("0 or more; use e.g. 5e-4", lambda value: 0 <= value < float("inf")),
        metavar="D",
    )
    schedule: str | None = _option(
        f"{', '.join(SCHEDULES)} (default: the recipe's, step)", **_chosen(SCHEDULES), metavar="NAME"
    )
    warmup_epochs: int | None = _option(
        "in which the rate rises to the initial one (default: none)",
        **_must("0 or more; use e.g. 5", lambda value: value >= 0),
        metavar="K",
    )
    label_smoothing: float | None = _option(
        "default: 0", **_must("0 or more and less than 1; use e.g. 0.1", lambda value: 0 <= value < 1), metavar="SHARE"
    )
    mixup: float | None = _option(
        "mix images in pairs (default: not)",
        **_must("a positive number; use e.g. 0.2", lambda value: 0 < value < float("inf")),
        metavar="ALPHA",
    )
    ema: float | None = _option(
        "evaluate and export a moving average of the weights (default: not; 0.999 where no DECAY is given)",
        **_must("more than 0 and less than 1; use e.g. 0.999", lambda value: 0 < value < 1),
        metavar="DECAY",
        nargs="?",
        const=0.999,
    )
    tp: int | None = _option(
        "tensor-parallel ranks a replica (default: as many of a host as share the groups)", metavar="P"
    )
    seed: int = _option(
        "of weights, order and augmentation (default: %(default)s)", default=0, described=True, bounds=(0, 2**63 - 1)
    )
    workers: int | None = _option(
        "data worker processes a rank (default: by data set)", bounds=(0, LARGEST_WORKERS), metavar="W"
    )
    activation_checkpointing: bool = _option(
        "residual units keep only their input for backward, and are computed again there", default=False
    )
    compile: bool = _option("compile the model for training, by torch.compile", default=False)
    config: str | None = _option(
        "a file of these options, as run.yaml in a run's output folder is one: flags win over it",
        each_start=True,
        metavar="YAML",
    )
    output_dir: str | None = _option(
        "default: runs/MODEL-CONV-GROUPS-DATASET, with a folder's name and a digest of its path for imagefolder",
        each_start=True,
        metavar="DIR",
    )
    resume: str | None = _option(
        "go on from the newest checkpoint of the run in DIR (default: in the output folder), with its options, as "
        "run.yaml there holds them; flags win, and may change epochs, batch and rate; with `auto`, in the output "
        "folder where there is one, and else begin",
        each_start=True,
        metavar="DIR",
        nargs="?",
        const="",
    )
    init_from: str | None = _option(
        "begin with the weights of an exported file or of a run, all but a last layer that does not fit", metavar="PATH"
    )
    keep: int = _option(
        "checkpoints to keep: the newest ones, and the best (default: %(default)s)",
        bounds=_COUNT,
        metavar="K",
        default=2,
    )
    save_every: float | None = _option(
        "save when so long has passed since the last checkpoint (default: at the end of an epoch only)",
        **_must(
            f"a positive number of minutes, {_LONGEST_WAIT / 60:g} at most; use e.g. 10",
            lambda value: 0 < value <= _LONGEST_WAIT / 60,
        ),
        metavar="MINUTES",
    )
    save_every_steps: int | None = _option("save after each K steps of an epoch, too", bounds=_COUNT, metavar="K")
    blocking_save: bool = _option(
        "write a checkpoint before training goes on, which saves the copy that is written beside it otherwise",
        default=False,
    )
    rank_timeout: float = _option(
        "end the run when a rank has given no sign of life for so long (default: %(default)g)",
        default=60.0,
        **_must(f"1 to {_LONGEST_WAIT} seconds; use e.g. 60", lambda value: 1 <= value <= _LONGEST_WAIT),
        metavar="SECONDS",
    )
    deepspeed_config: str | JsonObject | None = _option(  # noqa: RUF009
        "a DeepSpeed configuration (default: ZeRO 1)", *("--deepspeed_config", "--deepspeed-config"), metavar="JSON"
    )
    profile: int | None = _option(
        "write a trace of K steps, the third and on (default: 3), by torch's profiler to DIR/profile",
        each_start=True,
        bounds=(1, 1000),
        metavar="K",
        nargs="?",
        const=3,
    )
    dry_run: bool = _option(
        "check everything and say what would be trained, and train and write nothing", each_start=True, default=False
    )


EACH_START = tuple(each.name for each in fields(TrainOptions) if each.metadata["each_start"])
KEPT = tuple(sorted(each.name for each in fields(TrainOptions) if not each.metadata["each_start"]))
"""What a run writes for the next start."""


def flags_of(option: Field[object]) -> tuple[str, ...]:
    return option.metadata["flags"] or (f"--{option.name.replace('_', '-')}",)


def check_options(options: Namespace) -> None:
    """Refuses a value that can work beside no other.

    Raises:
        UsageError: the first that cannot.
    """
    for option in fields(TrainOptions):
        value, about, flag = getattr(options, option.name), option.metadata, flags_of(option)[0]
        if value is None:
            continue
        if about["bounds"] is not None:
            least, most = about["bounds"]
            if value < least:
                raise must_be(flag, f"{least} or more", value)
            if value > most:
                raise must_be(flag, f"{most} or less", value)
        if about["fits"] is not None and not about["fits"](value):
            raise UsageError(about["refusal"].format(flag=flag, value=value))


def check_network(options: Namespace | TrainSettings) -> None:
    """Refuses a network that there is none of."""
    check_model(options.model, options.conv, options.groups, options.num_classes, options.coarse_everywhere)
    check_coarse_level(options.conv, coarse_level_of(options))


def model_arguments(options: Namespace | TrainSettings, num_classes: int | None) -> ModelArguments:
    """Those of :func:`~tlgc_mp.models.create_model` for a network of so many classes, but for its name."""
    return {
        "conv": options.conv,
        "groups": options.groups,
        "num_classes": num_classes,
        "coarse_everywhere": options.coarse_everywhere,
        "coarse_kernel_size": options.coarse_kernel_size,
        "coarse_init": options.coarse_init,
        "coarse_channels": options.coarse_channels,
        "coarse_sum": options.coarse_sum,
    }
