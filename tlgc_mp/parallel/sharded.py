"""What all sharded layers have in common: they store a share, and show the whole.

A sharded layer keeps its class, its names and its code; what it gets beside them is called ``tlgc_...``. What it stores
is this rank's share; what its code, and anybody else's, reads as ``layer.weight`` is
a :class:`SplitTensor`, the whole weight to all appearances. So a subclass with a forward of its own, a hook, or a
penalty on weights computes what it does on one device.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, TypeAlias

import torch
from torch import Tensor, nn

from tlgc_mp.errors import UsageError
from tlgc_mp.parallel.gradient_shares import mark_gradient
from tlgc_mp.parallel.layout import Ranks
from tlgc_mp.parallel.partitioned import is_partitioned, partitioned
from tlgc_mp.parallel.plan import Placement
from tlgc_mp.parallel.split_tensor import (
    SplitTensor,
    enter_ranks,
    from_share,
    plain_gradient,
    share_in,
    to_share,
    whole,
)

if TYPE_CHECKING:
    from tlgc_mp.parallel.report import LayoutReport


class Region:
    """What the layers of one split model have in common.

    Attributes:
        ranks: the tensor-parallel ranks, on the group for collectives of forward and backward passes.
        tp_group: the same ranks, on the group that the engine knows.
        channels_apart: whether they can, since the model's code between layers leaves channels apart.
        plain: whether shares go from layer to layer as plain tensors, now.
        replicas: the ranks that hold this share, one of each replica; ``None`` where nobody asks.
        over_network: whether the tensor-parallel ranks lie on several hosts.
        in_engine: whether an engine clips gradients, and has looked at the optimizer. Else gradients know that they are
            shares (``gradient_shares.py``).
        report: how each layer is held, as ``model.layout``; a model may have an attribute of its own of that name.
    """

    def __init__(
        self,
        ranks: Ranks,
        tp_ranks: Ranks,
        channels_apart: bool,
        replicas: Ranks | None = None,
        over_network: bool = False,
    ) -> None:
        self.ranks = ranks
        self.tp_ranks = tp_ranks
        self.channels_apart = channels_apart
        self.plain = ranks.size == 1
        self.replicas = replicas
        self.over_network = over_network
        self.in_engine = True
        self.report: LayoutReport | None = None

    @contextlib.contextmanager
    def set_plain(self, plain: bool) -> Iterator[None]:
        before = self.plain
        self.plain = plain or self.ranks.size == 1
        try:
            yield
        finally:
            self.plain = before


class ShardedLayer:
    """What the class of every sharded layer begins with; :func:`shard_layer` makes one of a layer."""

    tlgc_region: Region
    tlgc_placement: Placement
    tlgc_shapes: dict[str, torch.Size]
    """Of the whole of what is cut."""

    if TYPE_CHECKING:

        def forward(self, *args: Any, **kwargs: Any) -> Tensor:
            """That of the class behind."""

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)  # type: ignore[misc]
        own = self.__dict__
        if "tlgc_region" not in own or name not in own["tlgc_placement"].dims or value is None:
            return value
        if value.shape == own["tlgc_shapes"].get(name) and own["tlgc_region"].ranks.size > 1:
            return self._tlgc_given_whole(name, value)
        if own["tlgc_region"].plain:
            return value
        if is_partitioned(value):
            return partitioned(value, self, name)  # type: ignore[arg-type]
        check_not_transformed()
        layout = own["tlgc_placement"].layout(name)
        ranks = own["tlgc_region"].ranks
        if name not in own["_parameters"]:
            shown = SplitTensor(value, layout, ranks)
        elif torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            shown = from_share(value, layout, ranks)
        else:  # it may be kept, and used where gradients are enabled
            with torch.enable_grad():
                shown = from_share(value, layout, ranks)
        shown.held = value
        return shown

    def _tlgc_given_whole(self, name: str, value: Tensor) -> Tensor:
        """What code reads of a whole tensor that stands where the share ``name`` was, as in a call of
        ``torch.func.functional_call`` with the state of one device."""
        ranks = self.tlgc_region.ranks
        if type(value) is SplitTensor:
            return value
        if not self.tlgc_region.plain:
            return enter_ranks(value, ranks)
        if name in self._buffers:  # type: ignore[attr-defined]  # what is written to a share would not reach it
            raise UsageError(
                f"{name} of a split {type(self).__name__} must be this rank's share, got a whole tensor of shape "
                f"{tuple(value.shape)}; leave it out, or give that of the split model's named_buffers()"
            )
        return to_share(enter_ranks(value, ranks), self.tlgc_placement.layout(name), ranks).contiguous()

    def __setattr__(self, name: str, value: object) -> None:
        own = self.__dict__
        if not isinstance(value, Tensor) or "tlgc_region" not in own or own["tlgc_region"].plain:
            super().__setattr__(name, value)
            return
        if name in own["tlgc_placement"].dims and name in own["_parameters"]:
            own["_parameters"][name] = self._tlgc_as_held(name, value)
            return
        if name in own["_buffers"]:
            # A buffer that forward code replaces is stored as the one before it was.
            value = self._tlgc_share_of(name, value) if name in own["tlgc_placement"].dims else whole(value)
        super().__setattr__(name, value)

    def _tlgc_share_of(self, name: str, value: Tensor) -> Tensor:
        """What is held of ``value`` as the cut buffer ``name``.

        Forward code gives the whole, and ``load_state_dict(assign=True)`` this rank's share.
        """
        layout, ranks = self.tlgc_placement.layout(name), self.tlgc_region.ranks
        shape = list(self.tlgc_shapes.setdefault(name, value.shape))
        if list(value.shape) == shape:
            return share_in(value, layout, ranks).clone()
        assert layout.dim is not None
        shape[layout.dim] //= ranks.size
        if type(value) is SplitTensor or list(value.shape) != shape:
            raise UsageError(
                f"{name} of a split {type(self).__name__} must be of shape {tuple(self.tlgc_shapes[name])}, got a "
                f"tensor of shape {tuple(value.shape)}; change the model before it is split"
            )
        return value

    def _tlgc_as_held(self, name: str, value: Tensor) -> nn.Parameter:
        """The share that ``value`` stands for, to be held as the cut parameter ``name``: as after ``weight -= x``, or
        from another layer, whose parameter is tied to this one from now on."""
        held = value.held if type(value) is SplitTensor else value
        own = self._parameters[name]  # type: ignore[attr-defined]
        fits = held is not None and own is not None and held.shape == own.shape
        if type(value) is SplitTensor:
            fits = fits and value.cut == self.tlgc_placement.layout(name)
        if not fits or not isinstance(held, nn.Parameter):
            raise UsageError(
                f"{name} of a split {type(self).__name__} must be a parameter cut as it is, got a "
                f"{type(value).__name__} of shape {tuple(value.shape)}; copy values into it, or change the model "
                "before it is split"
            )
        return held

    def __delattr__(self, name: str) -> None:
        own = self.__dict__
        if "tlgc_region" in own and own["tlgc_region"].ranks.size > 1 and name in own["tlgc_placement"].dims:
            raise UsageError(
                f"{name} of a split {type(self).__name__} must stay, since it is held in shares; prune, normalize or "
                "parametrize weights before the model is split"
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: Tensor | None) -> None:
        if type(param) is SplitTensor:
            raise UsageError(
                f"{name} of a split {type(self).__name__} must be a parameter of its own, got one that is held in "
                "shares; prune, normalize or parametrize weights before the model is split"
            )
        super().register_parameter(name, param)  # type: ignore[misc]
        own = self.__dict__
        if isinstance(param, nn.Parameter) and "tlgc_region" in own:
            keep_gradient_plain(param, None, own["tlgc_region"])

    def __reduce_ex__(self, protocol: SupportsIndex) -> Reduced:
        return reduced(self)  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, object]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        for key, param in self._parameters.items():  # type: ignore[attr-defined]
            if param is not None:
                keep_gradient_plain(param, self.tlgc_placement.dims.get(key), self.tlgc_region)
        if self.tlgc_region.ranks.size > 1 and not self.tlgc_region.in_engine:
            self.tlgc_mark_gradients(set())

    def tlgc_mark_gradients(self, marked: set[int]) -> None:
        """Has gradients know that they are shares; of the parameters that are not among ``marked`` yet."""
        for key in self.tlgc_placement.dims:
            param = self._parameters.get(key)  # type: ignore[attr-defined]
            if param is not None and id(param) not in marked:
                marked.add(id(param))
                mark_gradient(param, self.tlgc_placement.layout(key), self.tlgc_region.ranks)

    def _tlgc_adjust(self) -> None:
        """What a layer needs beside its share."""

    def tlgc_gather_whole(self, key: str) -> Tensor:
        """The whole parameter or buffer ``key``, assembled from the shares of all ranks of the group. Collective."""
        tensor: Tensor = {**self._parameters, **self._buffers}[key].detach()  # type: ignore[attr-defined]
        if key not in self.tlgc_placement.dims:
            return tensor.clone()
        made: Tensor = whole(
            SplitTensor(tensor.contiguous(), self.tlgc_placement.layout(key), self.tlgc_region.tp_ranks)
        )
        return made.clone(memory_format=torch.contiguous_format)


def keep_gradient_plain(param: nn.Parameter, dim: int | None, region: Region) -> None:
    """Sees to it that a parameter that is not cut gets a plain gradient: a function of autograd's own kind may hand a
    split one to a parameter that it was given plain. Neither copy nor pickle keeps the hook."""
    if dim is None and not region.channels_apart and (param.is_floating_point() or param.is_complex()):
        trained = param.requires_grad
        param.requires_grad_(True).register_hook(plain_gradient)  # also of one that is trained only later
        param.requires_grad_(trained)


def cut_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The parameters of which this rank holds a share, by name: none that ZeRO 3 has partitioned, and none in place of
    which a whole tensor stands."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, ShardedLayer):
            for key, param in module._parameters.items():
                cut = param is not None and key in module.tlgc_placement.dims and not hasattr(param, "ds_id")
                if param is not None and cut and param.shape != module.tlgc_shapes.get(key):
                    found.append((f"{name}.{key}" if name else key, param))
    return found


def check_not_transformed() -> None:
    """Refuses what would run a split model on tensors that stand for others.

    Raises:
        UsageError: within a transform of ``torch.func`` or forward-mode differentiation.
    """
    func = torch._C._are_functorch_transforms_active()
    if func or torch.autograd.forward_ad._current_level >= 0:
        raise UsageError(
            "a split model must be called outside of torch.func's transforms and of forward-mode differentiation, got "
            f"a call in {'a transform' if func else 'a dual level'}; use torch.autograd, or the model of one device"
        )


def split_class(base: type[nn.Module], kind: type) -> type[nn.Module]:
    """The class of a layer or model of class ``base`` after it is sharded. It bears the same name."""
    if (base, kind) not in _CLASSES:
        behind = getattr(kind, "tlgc_behind", ())
        own = {
            "__doc__": base.__doc__,
            "extra_repr": base.extra_repr,
            "__deepcopy__": getattr(base, "__deepcopy__", None),
        }
        names = {"made_from": (base, kind), "__module__": base.__module__, **own}
        _CLASSES[base, kind] = type(base.__name__, (kind, base, *behind), names)
    return _CLASSES[base, kind]


_CLASSES: dict[tuple[type[nn.Module], type], type[nn.Module]] = {}


Reduced: TypeAlias = tuple[Callable[..., object], tuple[type, ...], object]
"""As ``__reduce_ex__`` gives it."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


_ENGINES = ("_original_parameters", "_external_params", "all_parameters", "pre_bwd_fn", "post_bwd_fn")
"""Attributes that ZeRO 3 gives to modules, beside those that begin with ``ds_``."""


def reduced(module: nn.Module) -> Reduced:
    """What pickle and copy keep of a module: all but what an engine added, which belongs to that engine alone.

    Parameters that ZeRO 3 has partitioned are kept in full, so this is collective there.
    """
    clean = without_engine(module, {})
    cls, kinds = type(module), []
    while "made_from" in vars(cls):
        cls, kind = vars(cls)["made_from"]
        kinds.append(kind)
    return _empty, (cls, *reversed(kinds)), clean.__getstate__()


def without_engine(module: nn.Module | None, done: dict[int, Any]) -> Any:
    """``module``, with the same values and without the hooks and attributes of an engine.

    Args:
        done: by id, what has been made of modules and parameters so far: what is held twice stays one.
    """
    if module is None or isinstance(module, torch.jit.ScriptModule):
        return module
    if id(module) not in done:
        cls: Any = type(module)
        clean = done[id(module)] = cls.__new__(cls)
        state = {k: v for k, v in vars(module).items() if k not in _ENGINES and not k.startswith("ds_")}
        for name in HOOKS:
            kept = {key: hook for key, hook in state[name].items() if not is_engines(hook)}
            state[name] = type(state[name])(kept)
        state["_parameters"] = {k: _plain_parameter(p, done) for k, p in module._parameters.items()}
        state["_modules"] = {k: without_engine(part, done) for k, part in module._modules.items()}
        vars(clean).update(state)
    return done[id(module)]


def _plain_parameter(param: nn.Parameter | None, done: dict[int, Any]) -> Any:
    if param is None or (id(param) not in done and not vars(param)):
        return param
    if id(param) not in done:
        with zero3_gathered([param]) as was_away:
            values = param.data.clone() if was_away else param.data
        done[id(param)] = nn.Parameter(values, requires_grad=param.requires_grad)
    return done[id(param)]


EXTRA = "_extra_state"
"""The last part of the name under which a state dict holds a module's extra state."""


def extra_state(module: nn.Module) -> dict[str, object]:
    """What a module with a ``get_extra_state`` of its own adds to its state dict; nothing of others."""
    mine = type(module).get_extra_state is not nn.Module.get_extra_state
    return {EXTRA: module.get_extra_state()} if mine else {}


@contextlib.contextmanager
def zero3_gathered(parameters: Sequence[Any]) -> Iterator[bool]:
    """A context in which parameters that ZeRO 3 has partitioned are whole, and whether there are any. Collective."""
    held = [param for param in parameters if hasattr(param, "ds_id")]
    if not held:
        yield False
        return
    zero = sys.modules["deepspeed.runtime.zero.partition_parameters"]  # which has partitioned them
    away = [param for param in held if param.ds_status is not zero.ZeroParamStatus.AVAILABLE]
    with zero.GatheredParameters(away) if away else contextlib.nullcontext():
        yield True


def is_engines(hook: object) -> bool:
    return (getattr(hook, "__module__", "") or "").startswith("deepspeed")


def _empty(cls: type[nn.Module], *kinds: type) -> nn.Module:
    """An object to be filled by what pickle or copy kept of one."""
    for kind in kinds:
        cls = split_class(cls, kind)
    return cls.__new__(cls)
