"""Training recipes by name, and by flags. Section 4 of https://arxiv.org/abs/2110.05060, and a short one for digits."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass, fields, replace

from tlgc_mp.errors import UsageError, must_be, one_of
from tlgc_mp.json_types import JsonObject

OPTIMIZERS = ("sgd", "adamw")
SCHEDULES = ("step", "cosine", "onecycle")

_ADAMW = {"optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-2}
"""What torch.optim.AdamW itself begins with: a rate for SGD is far too large for it."""


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: passes over the training set.
        batch_size: samples an optimizer step, over all replicas.
        learning_rate: the initial one of ``step`` and ``cosine``, the largest of ``onecycle``.
        milestones: of ``step``: the rate is multiplied by ``decay`` after these epochs, of ``epochs`` in all.
        momentum, weight_decay: of the optimizer; AdamW has no momentum.
        optimizer: ``sgd`` or ``adamw``.
        schedule: ``step``, ``cosine`` (to 0) or ``onecycle``.
        warmup_epochs: in which the rate rises from a hundredth, before ``step`` or ``cosine``.
        label_smoothing: the share of the target that all classes have alike.
        mixup: alpha of the Beta distribution by which pairs of images are mixed; ``None`` for none.
        ema: the decay of the moving average of the weights that is evaluated and exported; ``None`` for none.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    milestones: tuple[int, ...]
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: float = 0.1
    optimizer: str = "sgd"
    schedule: str = "step"
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    mixup: float | None = None
    ema: float | None = None

    def milestone_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        """The optimizer steps after which the rate falls, when ``epochs`` are run: the recipe's own milestones, at the
        same share of the run."""
        return [round(milestone * epochs / self.epochs * steps_per_epoch) for milestone in self.milestones]


RECIPES = {
    "cifar": Recipe(epochs=200, batch_size=128, learning_rate=0.1, milestones=(60, 120, 160)),
    "imagenet": Recipe(epochs=90, batch_size=128, learning_rate=0.1, milestones=(30, 60), weight_decay=1e-4),
    "digits": Recipe(epochs=12, batch_size=32, learning_rate=0.05, milestones=(8, 11)),
}

FLAGS = ("optimizer", "momentum", "weight_decay", "schedule", "warmup_epochs", "label_smoothing", "mixup", "ema")
"""What of a recipe a flag of its name sets, beside epochs, batch and rate."""


def find_recipe(name: str) -> Recipe:
    """The recipe ``name``.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in RECIPES:
        raise must_be("--recipe", one_of(RECIPES), name)
    return RECIPES[name]


def default_recipe(dataset: str) -> str:
    """The name of the recipe for a data set where none is asked for."""
    return dataset if dataset in RECIPES else "cifar"


def with_flags(recipe: Recipe, options: Namespace, config: JsonObject) -> Recipe:
    """``recipe`` as the flags in ``options`` have it.

    Raises:
        UsageError: a value that means nothing beside another or beside ``config``.
    """
    given = {name: value for name in FLAGS if (value := getattr(options, name)) is not None}
    for section, names in (("optimizer", ("optimizer", "momentum", "weight_decay")), ("scheduler", ("schedule",))):
        names = (*names, "warmup_epochs") if section == "scheduler" else names
        for name in names if section in config else ():
            if name in given:
                raise UsageError(
                    f"--{name.replace('_', '-')} must be left out where the DeepSpeed configuration has its own "
                    f"{section}, got {given[name]}; leave out one of them"
                )
    if given.get("optimizer") == "adamw":
        if "momentum" in given:
            raise UsageError(f"--momentum must be left out with --optimizer adamw, got {given['momentum']}")
        recipe = replace(recipe, **_ADAMW)  # type: ignore[arg-type]
    recipe = replace(recipe, **given)
    if recipe.schedule == "onecycle" and recipe.warmup_epochs:
        raise UsageError(
            f"--warmup-epochs must be left out with --schedule onecycle, which warms up itself, got "
            f"{recipe.warmup_epochs}"
        )
    return recipe


def departures(name: str, recipe: Recipe) -> JsonObject:
    """What of ``recipe`` is otherwise than in the one of that name, but for epochs, batch and rate."""
    base = RECIPES[name]
    differing = [field.name for field in fields(Recipe) if getattr(recipe, field.name) != getattr(base, field.name)]
    return {field: getattr(recipe, field) for field in differing if field in FLAGS}
