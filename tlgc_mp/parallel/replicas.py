"""Whether the tensor-parallel ranks of a replica are what they must be: one model, one random state, one batch.

Ranks that are seeded, or fed, each on its own would train something that no single device does, and say nothing.
:func:`agree_on_model` compares their models before they are split. :class:`ReplicaWatch` then compares, every few
forward passes in training, what each of them is given and holds whole.
"""

from __future__ import annotations

import datetime
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._pytree import tree_leaves

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel import checksums
from tlgc_mp.parallel.collectives import start_all_gather
from tlgc_mp.parallel.elementwise import check_optimizers_over_shares
from tlgc_mp.parallel.equal_shares import LOOKED_AT, EqualShares
from tlgc_mp.parallel.layout import Ranks, new_group

CHECK_EVERY = 16
"""Forward passes in training from one check to the next; the first is checked, too."""

_TENSORS = 16
"""Of the tensors that every rank holds whole, how many a check looks at, at most, ..."""
_ELEMENTS = 1 << 19
"""... and how many of their elements. The next check goes on where this one stopped."""

_HEAD = 9
_COMPARED = _HEAD + 2 * _TENSORS
"""Slots that the ranks must agree in; those of shares, in which they must not, come after them."""
CHECK_BYTES = 8 * (_COMPARED + LOOKED_AT)
"""What a rank sends for a check."""
Slot: TypeAlias = int | Tensor
"""A number that is sent, or a tensor of shape () that holds one."""


def agree_on_model(model: nn.Module, group: dist.ProcessGroup, seed: int | None = None) -> int:
    """Has every rank of ``group`` hold the same ``model``, bit for bit. Collective.

    Where values differ, as those of ranks that are not seeded do, the first rank's are taken, as torch's
    DistributedDataParallel takes them, and it warns.

    Args:
        model: whole, with its values; of tensors on the meta device, the shapes are compared.
        seed: of the values that tensors on the meta device are going to get; that of the first rank's random state
            where not given.

    Returns:
        The seed to draw from.

    Raises:
        UsageError: on every rank, where they have other tensors, or are given other seeds.
    """
    own = torch.initial_seed() if seed is None else seed
    if dist.get_world_size(group) == 1:
        return own
    tensors = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(name, tensor) for name, tensor in tensors if not is_lazy(tensor)]
    sums = [0 if tensor.is_meta or not tensor.numel() else checksums.exact(tensor) for _, tensor in tensors]
    described = [
        f"{name}: {tuple(tensor.shape)}, {tensor.dtype}{'' if tensor.requires_grad else ', frozen'}"
        for name, tensor in tensors
    ]
    values = [int(value) for value in sums]
    meta = any(tensor.is_meta for _, tensor in tensors)
    mine = torch.tensor(
        [_digest(repr((described, values))), _digest(str(own)) if meta else 0], device=_device_of(group)
    )
    everyones = start_all_gather(mine, Ranks(group), of_pass=False)().tolist()
    if all(row == everyones[0] for row in everyones):
        return own
    ranks = dist.get_process_group_ranks(group)
    every: list[Any] = [None] * len(ranks)
    dist.all_gather_object(every, (described, values, own, seed is not None), group=group)
    ours, first_values, first_seed, _ = every[0]
    for rank, (theirs, _, their_seed, given) in zip(ranks[1:], every[1:], strict=True):
        if theirs != ours:
            name = next((a or b for a, b in _paired(ours, theirs) if a != b), "").split(":")[0]
            raise UsageError(
                f"model must be the same on every rank of a replica, got another {name} on rank {rank} than on rank "
                f"{ranks[0]}; build it alike"
            )
        if meta and given and their_seed != first_seed:
            raise UsageError(
                f"seed must be the same on every rank of a replica, got {their_seed} on rank {rank} and {first_seed} "
                f"on rank {ranks[0]}; give all ranks the same"
            )
    differ = [index for index in range(len(tensors)) if any(row[1][index] != first_values[index] for row in every)]
    if differ and dist.get_rank(group) == 0:
        warnings.warn(
            f"the ranks {ranks} of a replica hold other values of {tensors[differ[0]][0]}, and of {len(differ)} "
            f"tensors in all; those of rank {ranks[0]} are taken. Seed the ranks of a replica alike to be rid of this",
            stacklevel=3,
        )
    with torch.no_grad():
        for index in differ:
            _take_from_first(tensors[index][1], group, ranks[0])
    return int(first_seed)


def _take_from_first(tensor: Tensor, group: dist.ProcessGroup, first: int) -> None:
    """Overwrites ``tensor`` with what the rank ``first`` holds. Collective."""
    whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
    sent = whole.view(-1).view(torch.uint8).to(_device_of(group), copy=True)
    dist.broadcast(sent, first, group=group)
    tensor.detach().copy_(sent.to(whole.device).view(whole.dtype).view(whole.shape))


def _paired(ours: list[str], theirs: list[str]) -> Iterator[tuple[str, str]]:
    missing = [""] * abs(len(ours) - len(theirs))
    return zip(ours + missing, theirs + missing, strict=False)


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where tensors lie that ``group`` sends."""
    cpu = torch.device("cpu")
    if "cpu:" in dist.get_backend_config(group) or not torch.accelerator.is_available():
        return cpu
    return torch.accelerator.current_accelerator() or cpu


def watch_replicas(model: nn.Module, ranks: Ranks, timeout: datetime.timedelta | None = None) -> None:
    """Registers a :class:`ReplicaWatch` on ``model``, which is split over ``ranks``. Collective.

    Args:
        timeout: how long a rank waits for the others in a check; torch's default where not given.
    """
    if ranks.size == 1:
        return
    members = dist.get_process_group_ranks(ranks.group)
    group = new_group(members, timeout)
    watch = ReplicaWatch(Ranks(group), held_whole, CHECK_EVERY, EqualShares(model, Ranks(group), _device_of(group)))
    model.register_forward_pre_hook(watch.before, with_kwargs=True)
    model.register_forward_hook(watch.after)


def held_whole(model: nn.Module) -> list[tuple[str, Tensor]]:
    """The parameters and buffers of a split model that every rank holds whole, by name."""
    found: dict[int, tuple[str, Tensor]] = {}
    for name, module in model.named_modules():
        split = vars(module)["tlgc_placement"].dims if "tlgc_placement" in vars(module) else ()
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        # By items: under ZeRO 3, what is asked for by its key in a forward pass is gathered, then and ever after.
        for key, tensor in (*module._parameters.items(), *buffers.items()):
            partitioned = hasattr(tensor, "ds_id")  # by ZeRO 3: it may be on its way
            plain = type(tensor) in (Tensor, nn.Parameter) and not partitioned
            if tensor is not None and key not in split and plain and tensor.numel():
                found.setdefault(id(tensor), (f"{name}.{key}" if name else key, tensor))
    return list(found.values())


class _Piece(NamedTuple):
    """A part of a whole tensor that one check looks at."""

    name: str
    elements: Tensor


class _Check(NamedTuple):
    """A check under way."""

    number: int
    names: list[str]
    gathered: Callable[[], Tensor]


class ReplicaWatch:
    """Compares, every few forward passes in training, what the ranks of a replica are given and hold whole.

    One small collective is under way during the pass, on a group of its own, and judged when the next begins. Inputs on
    the CPU and integers must be the same bit for bit, what is floating point elsewhere up to rounding. Random states
    must be the same where the model draws from them.

    A copy of the model has a watch of its own, over the same group; of a model that is saved, the watch rests.

    Args:
        ranks: of the replica, over a group used for nothing else.
        whole: from the model to the tensors that every rank holds whole, by name.
        every: passes from one check to the next.
        shares: what the first check is to find beside that.
    """

    def __init__(
        self,
        ranks: Ranks | None,
        whole: Callable[[nn.Module], list[tuple[str, Tensor]]],
        every: int,
        shares: EqualShares | None = None,
    ) -> None:
        self.ranks = ranks
        self.whole, self.every, self.shares = whole, every, shares
        self.passes = 0
        self.place = 0, 0
        self.begun: list[Slot] | None = None
        self.check: _Check | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> ReplicaWatch:
        copied = ReplicaWatch(self.ranks, self.whole, self.every)
        memo[id(self)] = copied
        return copied

    def __getstate__(self) -> dict[str, object]:
        return {**vars(self), "ranks": None, "shares": None, "begun": None, "check": None}

    def before(self, module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """Begins a forward pass: judges a check that is under way, and begins the next when it is time."""
        if torch.compiler.is_compiling() or self.ranks is None:
            return
        if self.check is not None:
            self._judge()
        self.begun = None
        if not module.training:
            return
        inputs = tree_leaves((args, kwargs))
        if not all(_can_be_read(value) for value in inputs if isinstance(value, Tensor)):
            return
        self.passes += 1
        if self.passes == 2 and not getattr(vars(module).get("tlgc_region"), "in_engine", True):  # there is one by now
            check_optimizers_over_shares(module, self.ranks.size)
        if (self.passes - 1) % self.every == 0:
            with torch.no_grad():
                self.begun = [*_of_inputs(inputs), *_random_states(_device(module))]

    def after(self, module: nn.Module, args: tuple[object, ...], output: object) -> None:
        """Ends a forward pass: now it is known whether it drew random numbers, and the check is sent."""
        if torch.compiler.is_compiling() or self.begun is None or self.ranks is None:
            return
        begun, self.begun = self.begun, None
        device = _device(module)
        with torch.no_grad():
            drew = [now != before for now, before in zip(_random_states(device), begun[-2:], strict=True)]
            pieces = self._next_pieces(module)
            names = [piece.name for piece in pieces]
            slots = [self.passes, *begun, drew[0] + 2 * drew[1], _digest("\n".join(names))]
            for piece in pieces:
                slots += _of_tensor(piece.elements)
            slots += [0] * (_COMPARED - len(slots))
            slots += [0] * LOOKED_AT if self.shares is None else self.shares.slots(module)
            packed = _packed(slots, _device_of(self.ranks.group))
            gathered = start_all_gather(packed, self.ranks, of_pass=False)
            self.check = _Check(self.passes, names, gathered if packed.device.type == "cpu" else _to_host(gathered))

    def _next_pieces(self, module: nn.Module) -> list[_Piece]:
        """What this check looks at of the whole tensors; it goes on where the last one stopped."""
        tensors = self.whole(module)
        pieces: list[_Piece] = []
        room, (index, start) = _ELEMENTS, self.place
        for _ in range(min(len(tensors), _TENSORS)):
            if index >= len(tensors):
                index, start = 0, 0
            name, tensor = tensors[index]
            elements = checksums.flattened(tensor)[start : start + room]
            pieces.append(_Piece(name, elements))
            room -= len(elements)
            index, start = (index, start + len(elements)) if start + len(elements) < tensor.numel() else (index + 1, 0)
            if room <= 0:
                break
        self.place = index, start
        return pieces

    def _judge(self) -> None:
        """Raises :class:`UsageError`, on every rank, where a check found ranks that differ."""
        assert self.check is not None and self.ranks is not None
        check, self.check = self.check, None
        table = check.gathered()
        rows, values = table.tolist(), table.view(torch.float64).tolist()
        if self.shares is not None:
            shares, self.shares = self.shares, None
            shares.check([row[_COMPARED:] for row in rows])
        rows = [row[:_COMPARED] for row in rows]
        if all(row == rows[0] for row in rows):
            return
        members = dist.get_process_group_ranks(self.ranks.group)
        drew = 0
        for row in rows:
            drew |= row[7]
        for rank, row, floats in zip(members[1:], rows[1:], values[1:], strict=True):
            what, hint = _difference(rows[0], row, values[0], floats, drew, check.names)
            if what:
                raise UsageError(
                    f"{what} must be the same on every tensor-parallel rank of a replica, got another on rank {rank} "
                    f"than on rank {members[0]} in forward pass {check.number} in training; {hint}"
                )


def _difference(
    first: list[int], row: list[int], first_floats: list[float], floats: list[float], drew: int, names: list[str]
) -> tuple[str, str]:
    """What two ranks' slots differ in, and what to do about it; ("", "") where it is nothing that matters."""
    feed = "feed all ranks of a replica the same batches, with the same augmentation: draw by replica, not by rank"
    if first[0] != row[0]:
        return "the number of forward passes in training", "run the model on every rank alike"
    if first[1:3] != row[1:3] or not checksums.agree(_pair(first_floats, 3), _pair(floats, 3)):
        return "the batch", feed
    if (drew & 1 and first[5] != row[5]) or (drew & 2 and first[6] != row[6]):
        return "torch's random state, from which the model draws,", "seed every rank of a replica alike"
    change = "load and change weights on every rank of a replica alike"
    if first[8] != row[8]:
        return "what the model holds whole", change
    for index, name in enumerate(names):
        place = _HEAD + 2 * index
        same = first[place : place + 2] == row[place : place + 2]
        exact = first[place + 1] == _EXACT
        if not same and (exact or not checksums.agree(_pair(first_floats, place), _pair(floats, place))):
            return name, change
    return "", ""


def _pair(floats: list[float], place: int) -> tuple[float, float]:
    return floats[place], floats[place + 1]


_EXACT = -1
"""Stands in the second slot of a tensor whose first holds a checksum of all bits; no sum of squares has these bits."""


def _of_tensor(elements: Tensor) -> list[Slot]:
    """The two slots of a whole tensor."""
    if elements.is_floating_point():
        return list(checksums.rounded(elements).view(torch.int64))
    return [checksums.exact(elements), _EXACT]


def _of_inputs(inputs: list[object]) -> list[Slot]:
    """Four slots: what the inputs are, a checksum of those that must be the same in all bits, and two for the rest."""
    described: list[str] = []
    whole: list[Tensor] = []
    rest: list[Tensor] = []
    for value in inputs:
        if isinstance(value, Tensor):
            described.append(f"{tuple(value.shape)}, {value.dtype}")
            if value.numel():
                loose = value.is_floating_point() and value.device.type != "cpu"
                (rest if loose else whole).append(value)
        else:
            described.append(repr(value) if isinstance(value, int | float | str | None) else type(value).__name__)
    total: Slot = 0
    for position, value in enumerate(whole):
        total = total + checksums.exact(value).to(whole[0].device) * (2 * position + 1)
    pair: Iterable[Slot] = (0, 0)
    if rest:
        pair = torch.stack([checksums.rounded(value).to(rest[0].device) for value in rest]).sum(0).view(torch.int64)
    return [_digest("\n".join(described)), total, *pair]


def _can_be_read(tensor: Tensor) -> bool:
    """Whether it is a tensor with values of its own, and not one of a graph that is being traced."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta or tensor.layout != torch.strided:
        return False
    return not torch.jit.is_tracing() and not (tensor.is_cuda and torch.cuda.is_current_stream_capturing())


def _device(module: nn.Module) -> torch.device:
    return next((param.device for param in module.parameters()), torch.device("cpu"))


def _random_states(device: torch.device) -> list[int]:
    """Checksums of torch's random state on the CPU and on ``device``."""
    states = [int(checksums.exact(torch.get_rng_state()))]
    own = 0
    if device.type not in ("cpu", "meta"):
        own = int(checksums.exact(torch.get_device_module(device).get_rng_state(device)))
    return [*states, own]


def _packed(slots: list[Slot], device: torch.device) -> Tensor:
    """Numbers and tensors of shape () as one int64 tensor on ``device``."""
    numbers = torch.tensor([0 if isinstance(slot, Tensor) else slot for slot in slots]).to(device)
    places = [index for index, slot in enumerate(slots) if isinstance(slot, Tensor)]
    if places:
        numbers[places] = torch.stack([slot.to(device) for slot in slots if isinstance(slot, Tensor)])
    return numbers


def _to_host(gathered: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``gathered``, of which the result comes to the CPU without holding up an accelerator's queue of kernels."""
    table = gathered()  # on an accelerator this waits for nothing: it orders the queues
    host = torch.empty_like(table, device="cpu", pin_memory=True)
    host.copy_(table, non_blocking=True)
    event = torch.Event(table.device)
    event.record()

    def wait() -> Tensor:
        event.synchronize()
        return host

    return wait


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big", signed=True)
