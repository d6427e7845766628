"""The convolutions, on one device. Knows torch and nothing else."""

from tlgc_mp.nn.balanced import BalancedConv1d, BalancedConv2d, BalancedConv3d
from tlgc_mp.nn.fully_learnable import FullyLearnableGroupConv2d, PermutedGroupConv2d
from tlgc_mp.nn.init import init_parameters
from tlgc_mp.nn.prototype import TwoLevelPrototypeConv1d, TwoLevelPrototypeConv2d, TwoLevelPrototypeConv3d
from tlgc_mp.nn.shuffle import ShuffleConv1d, ShuffleConv2d, ShuffleConv3d
from tlgc_mp.nn.two_level import TwoLevelConv1d, TwoLevelConv2d, TwoLevelConv3d

__all__ = [
    "BalancedConv1d",
    "BalancedConv2d",
    "BalancedConv3d",
    "FullyLearnableGroupConv2d",
    "PermutedGroupConv2d",
    "ShuffleConv1d",
    "ShuffleConv2d",
    "ShuffleConv3d",
    "TwoLevelConv1d",
    "TwoLevelConv2d",
    "TwoLevelConv3d",
    "TwoLevelPrototypeConv1d",
    "TwoLevelPrototypeConv2d",
    "TwoLevelPrototypeConv3d",
    "init_parameters",
]
