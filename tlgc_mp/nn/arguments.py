"""The arguments that the convolutions have in common, checked."""

from __future__ import annotations

from torch.nn.modules.utils import _pair

from tlgc_mp.errors import UsageError, divisors, one_of


def check_groups(groups: int, **channels: int) -> None:
    """Raises :class:`UsageError` unless ``groups`` divides every one of the named channel counts."""
    for name, count in channels.items():
        if not isinstance(count, int) or count < 1:
            raise UsageError(f"{name}={count} is not a number of channels; use 1 or more")
    for name, count in channels.items():
        if not isinstance(groups, int) or groups < 1 or count % groups:
            common = [d for d in divisors(count) if all(other % d == 0 for other in channels.values())]
            raise UsageError(f"groups={groups} does not divide {name}={count}; use {one_of(common)}")


def positive_pair(name: str, value: int | tuple[int, int]) -> tuple[int, int]:
    """(vertical, horizontal) of the argument ``name``, given as one int or as both."""
    pair = _pair(value)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 1 for v in pair):
        raise UsageError(f"{name}={value!r} is not a positive int or a pair of them")
    return tuple(pair)


def padding_pair(
    padding: int | tuple[int, int] | str, kernel: tuple[int, int], stride: tuple[int, int], dilation: tuple[int, int]
) -> tuple[int, int]:
    """The padding in numbers: an int, a pair, ``"valid"``, or ``"same"`` where it can be centred."""
    if padding == "valid":
        return (0, 0)
    if padding == "same":
        reach = [step * (d - 1) for step, d in zip(dilation, kernel, strict=True)]
        if stride != (1, 1) or any(r % 2 for r in reach):
            raise UsageError(
                f"padding='same' needs stride 1 and an even dilation * (kernel_size - 1), got stride={stride}, "
                f"kernel_size={kernel}, dilation={dilation}; give the padding in numbers"
            )
        return (reach[0] // 2, reach[1] // 2)
    pair = _pair(padding)
    if len(pair) != 2 or any(not isinstance(v, int) or v < 0 for v in pair):
        raise UsageError(f"padding={padding!r} is not a non-negative int, a pair of them, 'same' or 'valid'")
    return tuple(pair)
