"""Training recipes by name. Section 4 of https://arxiv.org/abs/2110.05060, and a short one for handwritten digits."""

from __future__ import annotations

from dataclasses import dataclass

from tlgc_mp.errors import UsageError, one_of


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with momentum and a learning rate that falls in steps.

    Attributes:
        epochs: passes over the training set.
        batch_size: samples an optimizer step, over all replicas.
        learning_rate: the initial one.
        milestones: the rate is multiplied by ``decay`` after these epochs, of ``epochs`` in all.
        momentum, weight_decay: of the optimizer.
    """

    epochs: int
    batch_size: int
    learning_rate: float
    milestones: tuple[int, ...]
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay: float = 0.1

    def milestone_steps(self, epochs: int, steps_per_epoch: int) -> list[int]:
        """The optimizer steps after which the rate falls, when ``epochs`` are run: the recipe's own milestones, at the
        same share of the run."""
        return [round(milestone * epochs / self.epochs * steps_per_epoch) for milestone in self.milestones]


RECIPES = {
    "cifar": Recipe(epochs=200, batch_size=128, learning_rate=0.1, milestones=(60, 120, 160)),
    "imagenet": Recipe(epochs=90, batch_size=128, learning_rate=0.1, milestones=(30, 60), weight_decay=1e-4),
    "digits": Recipe(epochs=12, batch_size=32, learning_rate=0.05, milestones=(8, 11)),
}


def find_recipe(name: str) -> Recipe:
    """The recipe ``name``.

    Raises:
        UsageError: there is none of that name.
    """
    if name not in RECIPES:
        raise UsageError(f"--recipe={name!r} is unknown; use {one_of(RECIPES)}")
    return RECIPES[name]


def default_recipe(dataset: str) -> str:
    """The name of the recipe for a data set where none is asked for."""
    return dataset if dataset in RECIPES else "cifar"
