"""The convolutions, on one device. Knows torch and nothing else."""

from tlgc_mp.nn.init import init_parameters
from tlgc_mp.nn.two_level import TwoLevelConv2d

__all__ = ["TwoLevelConv2d", "init_parameters"]
