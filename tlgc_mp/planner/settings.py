"""What ``tlgc-mp plan`` is asked, checked before torch is loaded."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from tlgc_mp.errors import UsageError, divisors, is_count, one_of
from tlgc_mp.models.names import (
    NamedModel,
    check_coarse_level,
    check_model,
    check_split,
    coarse_level_of,
    library_model,
    parse_model,
)
from tlgc_mp.planner.devices import (
    DTYPES,
    Device,
    Network,
    find_device,
    read_bandwidth,
    read_hosts,
    read_memory,
)
from tlgc_mp.training.options import model_arguments
from tlgc_mp.training.recipes import OPTIMIZERS, Recipe, find_recipe

IMAGES = {"cifar": 50_000, "imagenet": 1_281_167, "digits": 1_437}
"""Recipe -> images of an epoch of the data set that it is for."""

GROUPS = (2, 4, 8, 16)
"""N to choose from where nothing says."""

LARGEST_BATCH = 1_000_000


@dataclass(frozen=True)
class PlanSettings:
    """A plan to be made, every choice made that is not to be searched.

    Attributes:
        groups: N, of which the best is sought.
        tensor_parallel: P, or ``None`` where it is sought.
        memory: bytes of a rank.
        images: of an epoch of the recipe.
        output: the folder of what is written, or ``None``.
    """

    model: NamedModel
    groups: tuple[int, ...]
    tensor_parallel: int | None
    device: Device
    network: Network
    memory: float
    batch_size: int
    image_size: int
    optimizer: str
    dtype: str
    recipe_name: str
    recipe: Recipe
    output: str | None

    @property
    def ranks(self) -> int:
        return self.network.hosts * self.network.ranks

    @property
    def images(self) -> int:
        """In all epochs of the recipe."""
        return self.recipe.epochs * IMAGES[self.recipe_name]


def resolve(options: Namespace) -> PlanSettings:
    """Turns parsed command-line ``options`` into a complete question.

    Raises:
        UsageError: an option that cannot work, or two that do not fit together.
    """
    groups = _groups(options)
    check_coarse_level(options.conv, coarse_level_of(options))
    device = find_device(options.gpu, options.calibrated)
    network = read_hosts(options.hosts, options.ranks, read_bandwidth(options.network))
    ranks = network.hosts * network.ranks
    if options.tp is not None:
        if not is_count(options.tp) or ranks % options.tp:
            raise UsageError(f"--tp must divide the {ranks} ranks, got {options.tp}; use {one_of(divisors(ranks))}")
        for count in groups:
            check_split(options.model, options.conv, count, options.tp)
    memory = device.memory if options.memory is None else read_memory(options.memory)
    if memory <= device.fixed:
        raise UsageError(
            f"--memory must be more than the {device.fixed / 2**30:.2f} GiB that a process takes, got "
            f"{options.memory}; use e.g. 24GiB"
        )
    if options.dtype not in DTYPES:
        raise UsageError(f"--dtype must be {one_of(DTYPES)}, got {options.dtype!r}")
    if options.optimizer not in OPTIMIZERS:
        raise UsageError(f"--optimizer must be {one_of(OPTIMIZERS)}, got {options.optimizer!r}")
    small = library_model(options.model) is None and options.model.startswith("wrn-")
    recipe_name = options.recipe or ("cifar" if small else "imagenet")
    recipe = find_recipe(recipe_name)
    for flag, value, least, most in (
        ("--batch-size", options.batch_size, 1, LARGEST_BATCH),
        ("--image-size", options.image_size, 8, 4096),
    ):
        if value is not None and not least <= value <= most:
            raise UsageError(f"{flag} must be {least} to {most}, got {value}")
    return PlanSettings(
        model={**model_arguments(options, options.num_classes), "name": options.model},
        groups=groups,
        tensor_parallel=options.tp,
        device=device,
        network=network,
        memory=memory,
        batch_size=recipe.batch_size if options.batch_size is None else options.batch_size,
        image_size=(32 if small else 224) if options.image_size is None else options.image_size,
        optimizer=options.optimizer,
        dtype=options.dtype,
        recipe_name=recipe_name,
        recipe=recipe,
        output=options.output,
    )


def _groups(options: Namespace) -> tuple[int, ...]:
    """Every N to be tried, each of which the model takes."""
    if options.groups is not None or options.conv == "sc":
        count = 1 if options.groups is None else options.groups
        check_model(options.model, options.conv, count, options.num_classes, options.coarse_everywhere)
        return (count,)
    if library_model(options.model) is None and options.model.startswith("wrn-"):
        parse_model(options.model)
    found = []
    for count in GROUPS:
        try:
            check_model(options.model, options.conv, count, options.num_classes, options.coarse_everywhere)
        except UsageError:
            if count == GROUPS[0]:
                raise
            continue
        found.append(count)
    return tuple(found)
