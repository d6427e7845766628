"""Recipes: the paper's figures, and milestones that keep their share of the run."""

from __future__ import annotations

import pytest

from tlgc_mp.errors import UsageError
from tlgc_mp.training.recipes import RECIPES, default_recipe, find_recipe


def test_cifar_is_the_papers() -> None:
    recipe = find_recipe("cifar")
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate) == (200, 128, 0.1)
    assert (recipe.milestones, recipe.decay) == ((60, 120, 160), 0.1)
    assert (recipe.momentum, recipe.weight_decay) == (0.9, 5e-4)


@pytest.mark.parametrize(
    ("name", "epochs", "steps_per_epoch", "milestones"),
    [
        ("cifar", 200, 390, [23400, 46800, 62400]),  # 60, 120, 160 epochs of 390 steps
        ("cifar", 100, 390, [11700, 23400, 31200]),  # half as many
        ("cifar", 1, 10, [3, 6, 8]),  # 0.3, 0.6, 0.8 of the one epoch
        ("imagenet", 90, 7, [210, 420]),
        ("digits", 2, 44, [59, 81]),  # 2/3 and 11/12 of 88
    ],
)
def test_milestones_move_with_the_epochs(name: str, epochs: int, steps_per_epoch: int, milestones: list[int]) -> None:
    assert RECIPES[name].milestone_steps(epochs, steps_per_epoch) == milestones


@pytest.mark.parametrize(
    ("dataset", "recipe"),
    [
        ("digits", "digits"),
        ("imagenet", "imagenet"),
        ("cifar10", "cifar"),
        ("cifar100", "cifar"),
        ("imagefolder", "cifar"),
        ("synthetic", "cifar"),
    ],
)
def test_recipe_follows_from_the_data_set(dataset: str, recipe: str) -> None:
    assert default_recipe(dataset) == recipe


def test_unknown_recipe_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="--recipe must be one of cifar, imagenet, digits, got 'mnist'"):
        find_recipe("mnist")
