"""The convolutions, on one device. Knows torch and nothing else."""

from tlgc_mp.nn.balanced import BalancedConv2d
from tlgc_mp.nn.fully_learnable import FullyLearnableGroupConv2d, PermutedGroupConv2d
from tlgc_mp.nn.init import init_parameters
from tlgc_mp.nn.prototype import TwoLevelPrototypeConv2d
from tlgc_mp.nn.shuffle import ShuffleConv2d
from tlgc_mp.nn.two_level import TwoLevelConv2d

__all__ = [
    "BalancedConv2d",
    "FullyLearnableGroupConv2d",
    "PermutedGroupConv2d",
    "ShuffleConv2d",
    "TwoLevelConv2d",
    "TwoLevelPrototypeConv2d",
    "init_parameters",
]
