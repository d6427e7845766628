"""Private names of torch: what the package relies upon, checked with the torch that is installed."""

from __future__ import annotations

import datetime
from collections import namedtuple
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.ranks import run_ranks
from tests.versions.rows import relies_on

# Tensors of a class of their own.


class Wrapper(Tensor):
    """As a split tensor: no memory of its own, and another tensor's numbers."""

    held: Tensor
    functions: ClassVar[list[Any]] = []
    operators: ClassVar[list[Any]] = []

    @staticmethod
    def __new__(cls, held: Tensor) -> Wrapper:
        made = torch.Tensor._make_wrapper_subclass(
            cls, (2, 6), strides=(1, 2), storage_offset=3, dtype=torch.float64, device=held.device
        )
        made.held = held
        return made

    def __init__(self, *args: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.functions.append(func)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.operators.append(func)
        return func(*[a.held if isinstance(a, Wrapper) else a for a in args], **(kwargs or {}))


@relies_on("torch._ops.OpOverload")
def operator_overload() -> None:
    """The class of an operator that a dispatch is given: its name in its namespace, its packet, its tags."""
    relu = torch.ops.aten.relu.default
    assert type(relu) is torch._ops.OpOverload and relu.namespace == "aten"
    assert relu.overloadpacket is torch.ops.aten.relu and torch.Tag.pointwise in relu.tags


@relies_on("torch.Tensor._make_wrapper_subclass")
def wrapper_subclass() -> None:
    """Makes a tensor of a class, with a shape, strides, an offset, a type and a device, and none of the memory."""
    made = Wrapper(torch.ones(2))
    assert type(made) is Wrapper and tuple(made.shape) == (2, 6) and made.stride() == (1, 2)
    assert (made.storage_offset(), made.dtype, made.device.type, made.requires_grad) == (3, torch.float64, "cpu", False)


class Plain(Tensor):
    """As a split tensor of one value."""


@relies_on("torch.Tensor._make_subclass")
def subclass() -> None:
    """Makes a tensor of a class that shares the memory of one, and whose ``data`` can be set."""
    plain, other = torch.tensor(3.0), torch.tensor(5.0)
    made, replaced = (torch.Tensor._make_subclass(Plain, tensor) for tensor in (plain, other))
    assert type(made) is Plain and made.data_ptr() == plain.data_ptr()
    made.data = replaced
    assert made.data_ptr() == other.data_ptr() and float(made) == 5.0 and float(plain) == 3.0


@relies_on("torch._C.DisableTorchFunctionSubclass")
def functions_disabled() -> None:
    """Within it a function of a subclass is torch's own, and its operators arrive at the subclass all the same."""
    made = Wrapper(torch.tensor([1.0, 2.0]))
    Wrapper.functions.clear()
    Wrapper.operators.clear()
    assert (made + 1).tolist() == [2.0, 3.0]
    assert Wrapper.functions == [Tensor.add] and Wrapper.operators == [torch.ops.aten.add.Tensor]
    with torch._C.DisableTorchFunctionSubclass():
        made + 1
    assert len(Wrapper.functions) == 1 and len(Wrapper.operators) == 2


@relies_on("torch.utils._mode_utils.no_dispatch")
def dispatch_disabled() -> None:
    """Within it an operator changes the shape of a tensor that has no memory, and does not arrive at its class."""
    from torch.utils._mode_utils import no_dispatch

    made = Wrapper(torch.ones(2))
    Wrapper.operators.clear()
    with no_dispatch(), torch._C.DisableTorchFunctionSubclass():
        torch.ops.aten.unsqueeze_(made, 0)
    assert tuple(made.shape) == (1, 2, 6) and not Wrapper.operators


class Conjugating(Wrapper):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keys = (torch._C.DispatchKey.Conjugate, torch._C.DispatchKey.Negative)
        assert all(torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys)
        marked = args[0].held.conj()
        assert marked.is_conj()
        try:
            for key in keys:
                torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
            return func(marked, *args[1:])
        finally:
            for key in keys:
                torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


@relies_on(
    "torch._C.DispatchKey.Conjugate",
    "torch._C.DispatchKey.Negative",
    "torch._C._dispatch_tls_is_dispatch_key_excluded",
    "torch._C._dispatch_tls_set_dispatch_key_excluded",
)
def conjugates_in_dispatch() -> None:
    """What looks at marks of a conjugate is excluded where operators arrive at a class, and can be let in again."""
    given = torch.tensor([1 + 2j, 3 - 1j])
    assert torch.equal(Conjugating(given) * 2, torch.tensor([2 - 4j, 6 + 2j]))


@relies_on("._neg_view")
def negative_view() -> None:
    """Marks a tensor as the negative of its memory, or takes that mark away."""
    x = torch.tensor([1.0, -2.0])
    assert x._neg_view().is_neg() and x._neg_view().tolist() == [-1.0, 2.0]
    assert not x._neg_view()._neg_view().is_neg() and x._neg_view().data_ptr() == x.data_ptr()


# Operators.


@relies_on("._schema", "._overloadname")
def schema() -> None:
    """Says what an operator's arguments are called, which it writes, and what of its results are views."""
    add = torch.ops.aten.add.out
    assert add._schema.name == "aten::add" and add._overloadname == "out"
    assert [a.name for a in add._schema.arguments] == ["self", "other", "alpha", "out"]
    assert [a.kwarg_only for a in add._schema.arguments] == [False, False, True, True]
    written = [a.alias_info is not None and a.alias_info.is_write for a in add._schema.arguments]
    assert written == [False, False, False, True]
    viewed = torch.ops.aten.select.int._schema.returns
    assert [r.alias_info is not None and not r.alias_info.is_write for r in viewed] == [True]
    assert torch.ops.aten.transpose_.default._overloadname == "default"


_NORM = "input weight bias running_mean running_var"
_OPERATORS = {
    "_adaptive_avg_pool2d": "self output_size",
    "_adaptive_avg_pool2d_backward": "grad_output self",
    "_adaptive_avg_pool3d": "self output_size",
    "_adaptive_avg_pool3d_backward": "grad_output self",
    "_batch_norm_no_update": f"{_NORM} momentum eps",
    "_batch_norm_with_update": f"{_NORM} momentum eps",
    "_conj": "self",
    "_log_softmax": "self dim half_to_float",
    "_log_softmax_backward_data": "grad_output output dim input_dtype",
    "_native_batch_norm_legit": f"{_NORM} training momentum eps",
    "_neg_view": "self",
    "_prelu_kernel": "self weight",
    "_prelu_kernel_backward": "grad_output self weight",
    "_reshape_alias": "self size stride",
    "_safe_softmax": "self dim dtype",
    "_softmax": "self dim half_to_float",
    "_softmax_backward_data": "grad_output output dim input_dtype",
    "_to_copy": "self dtype layout device pin_memory non_blocking memory_format",
    "_unsafe_view": "self size",
    "_upsample_bicubic2d_aa": "self output_size align_corners scales_h scales_w",
    "_upsample_bicubic2d_aa_backward": "grad_output output_size input_size align_corners scales_h scales_w",
    "_upsample_bilinear2d_aa": "self output_size align_corners scales_h scales_w",
    "_upsample_bilinear2d_aa_backward": "grad_output output_size input_size align_corners scales_h scales_w",
    "_upsample_nearest_exact1d": "self output_size scales",
    "_upsample_nearest_exact1d_backward": "grad_output output_size input_size scales",
    "_upsample_nearest_exact2d": "self output_size scales_h scales_w",
    "_upsample_nearest_exact2d_backward": "grad_output output_size input_size scales_h scales_w",
    "_upsample_nearest_exact3d": "self output_size scales_d scales_h scales_w",
    "_upsample_nearest_exact3d_backward": "grad_output output_size input_size scales_d scales_h scales_w",
}


@relies_on(*(f"torch.ops.aten.{name}" for name in _OPERATORS))
def arguments_of_operators() -> None:
    """Take these arguments, in this order: rules read them by position."""
    for name, expected in _OPERATORS.items():
        found = " ".join(a.name for a in getattr(torch.ops.aten, name).default._schema.arguments)
        assert found == expected, f"torch.ops.aten.{name} takes {found}; its rule expects {expected}"
    unseen = torch.ops.aten._native_batch_norm_legit.no_stats._schema
    assert [a.name for a in unseen.arguments][:4] == ["input", "weight", "bias", "training"]


@relies_on("torch.ops.aten._scaled_dot_product_flash_attention_for_cpu", "._scaled_dot_product_flash_attention_for_cpu")
def attention_on_a_cpu() -> None:
    """What attention on a CPU arrives as, forward and backward: tensors first, then the rate of dropout."""
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default._schema
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default._schema
    assert [a.name for a in forward.arguments][:4] == ["query", "key", "value", "dropout_p"]
    names = [a.name for a in backward.arguments]
    assert names[:7] == ["grad_out", "query", "key", "value", "out", "logsumexp", "dropout_p"]
    assert all("attn_mask" in [a.name for a in s.arguments if a.kwarg_only] for s in (forward, backward))


# Trees of values.


@relies_on("torch.utils._pytree.tree_leaves", "torch.utils._pytree.tree_map", "torch.utils._pytree.tree_map_only")
def trees() -> None:
    """Leaves of lists, tuples, named ones and dicts are found in order, and replaced where they are of a type."""
    from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

    pair = namedtuple("pair", "a b")
    tree = {"x": [1, (2.0, None)], "y": pair(3, "z")}
    assert tree_leaves(tree) == [1, 2.0, None, 3, "z"]
    assert tree_leaves(((tree["x"], 5), {"k": 6})) == [1, 2.0, None, 5, 6]
    assert tree_map(str, tree) == {"x": ["1", ("2.0", "None")], "y": pair("3", "z")}
    assert tree_map_only(int, lambda n: -n, tree) == {"x": [-1, (2.0, None)], "y": pair(-3, "z")}


# Modules.


@relies_on(
    "._global_forward_hooks", "._global_forward_pre_hooks", "._global_backward_hooks", "._global_backward_pre_hooks"
)
def hooks_of_all_modules() -> None:
    """The hooks that are registered for all modules, by kind: dicts in which each stands."""
    from torch.nn.modules import module

    kinds = {
        "_global_forward_pre_hooks": module.register_module_forward_pre_hook,
        "_global_forward_hooks": module.register_module_forward_hook,
        "_global_backward_pre_hooks": module.register_module_full_backward_pre_hook,
        "_global_backward_hooks": module.register_module_full_backward_hook,
    }
    for name, register in kinds.items():
        assert not getattr(module, name), name
        handle = register(lambda *_: None)  # type: ignore[operator]
        try:
            assert getattr(module, name), f"{register.__name__} leaves nothing in {name}"
        finally:
            handle.remove()


@relies_on(
    "torch.nn.modules.conv._ConvNd",
    "torch.nn.modules.conv._ConvTransposeNd",
    "torch.nn.modules.batchnorm._NormBase",
    "torch.nn.modules.batchnorm._BatchNorm",
)
def classes_of_layers() -> None:
    """The common classes of convolutions, of transposed ones, of norms with statistics, and of batch norms."""
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

    transposed = {nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d}
    convolutions = {nn.Conv1d, nn.Conv2d, nn.Conv3d, *transposed}
    batch = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm}
    instance = {nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d}
    layers = {*convolutions, *batch, *instance, nn.GroupNorm, nn.LayerNorm, nn.Linear}
    expected = {_ConvNd: convolutions, _ConvTransposeNd: transposed, _NormBase: batch | instance, _BatchNorm: batch}
    for base, kinds in expected.items():
        assert {layer for layer in layers if issubclass(layer, base)} == kinds, base.__name__


@relies_on("._parameters", "._buffers", "._modules", "._non_persistent_buffers_set")
def contents_of_modules() -> None:
    """A module's own tensors and children by name, absent ones as ``None``; what is put there is the module's."""
    layer: Any = nn.Conv2d(2, 2, 1, bias=False)
    layer.register_buffer("kept", torch.ones(1))
    layer.register_buffer("passing", torch.ones(1), persistent=False)
    layer.child = nn.Identity()
    assert list(layer._parameters) == ["weight", "bias"] and layer._parameters["bias"] is None
    assert list(layer._buffers) == ["kept", "passing"] and layer._non_persistent_buffers_set == {"passing"}
    assert list(layer._modules) == ["child"] and vars(layer)["_buffers"] is layer._buffers
    share = nn.Parameter(torch.zeros(1, 2, 1, 1))
    layer._parameters["weight"] = share
    assert layer.weight is share and layer.state_dict().keys() == {"weight", "kept"}


@relies_on("._apply")
def applied_to_a_module_alone() -> None:
    """Replaces a module's own parameters and buffers by a function of them, and leaves those of its children."""
    layer: Any = nn.BatchNorm1d(2, device="meta")
    layer.child = nn.Linear(2, 2, device="meta")
    layer._apply(lambda tensor: torch.ones(2), recurse=False)
    own = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    assert len(own) == 5 and not any(tensor.is_meta for tensor in own)
    assert all(isinstance(parameter, nn.Parameter) for parameter in layer._parameters.values())
    assert all(parameter.is_meta for parameter in layer.child.parameters())


@relies_on("._forward_hooks", "._forward_pre_hooks", "._backward_hooks", "._backward_pre_hooks")
def hooks() -> None:
    """The hooks of a module by kind, and those of a leaf's gradient: dicts in which each stands, and no other place."""
    layer = nn.Linear(2, 2)
    kinds = {
        "_forward_hooks": layer.register_forward_hook,
        "_forward_pre_hooks": layer.register_forward_pre_hook,
        "_backward_hooks": layer.register_full_backward_hook,
        "_backward_pre_hooks": layer.register_full_backward_pre_hook,
    }
    for name, register in kinds.items():
        assert not vars(layer)[name]

        def hook(*_: Any) -> None:
            return None

        handle = register(hook)  # type: ignore[operator]
        assert list(vars(layer)[name].values()) == [hook], name
        del vars(layer)[name][handle.id]
    seen = []
    weight: Any = layer.weight
    assert not weight._backward_hooks
    weight.register_hook(seen.append)
    assert list(weight._backward_hooks.values()) == [seen.append]
    layer(torch.ones(1, 2)).sum().backward()
    assert len(seen) == 1


# Processes.


def _on_ranks() -> None:
    from torch.distributed.distributed_c10d import _get_default_store, _resolve_process_group

    rank = dist.get_rank()
    store = _get_default_store()
    store.set(f"from {rank}", str(rank))
    assert store.get(f"from {1 - rank}") == str(1 - rank).encode(), "_get_default_store: a store of its own"
    assert not store.check(["nobody's"]), "_get_default_store: its store does not say what it has not"

    limit = datetime.timedelta(seconds=7)
    group: Any = dist.new_group(timeout=limit)
    assert _resolve_process_group(group.group_name) is group, "_resolve_process_group: another group"
    found = group._get_backend(torch.device("cpu")).options._timeout
    assert found == limit, f"_timeout of a group's backend is {found}, not {limit}"

    world = dist.distributed_c10d._world
    world.group_count = 1_000_000
    later: Any = dist.new_group()
    assert later.group_name == "1000000", f"_world.group_count is not the next group's name: {later.group_name}"


@relies_on(
    "torch.distributed.distributed_c10d._get_default_store",
    "torch.distributed.distributed_c10d._resolve_process_group",
    "torch.distributed.distributed_c10d._world",
    "._get_backend",
    "._timeout",
)
def process_groups() -> None:
    """The store that all ranks share; a group by its name; how long it waits; the number of the next group."""
    run_ranks(2, _on_ranks)


@relies_on("._allgather_base", "._reduce_scatter_base")
def collectives() -> None:
    """Methods of a process group that gather into one tensor and scatter a sum; newer releases call them otherwise."""
    for old, new in (("_allgather_base", "all_gather_single"), ("_reduce_scatter_base", "reduce_scatter_single")):
        assert hasattr(dist.ProcessGroup, old) or hasattr(dist.ProcessGroup, new), f"neither {old} nor {new}"


class _Counting(nn.Module):
    def get_extra_state(self) -> int:
        return 7


@relies_on("._is_zerotensor")
def zeros_without_numbers() -> None:
    """Says of a tensor that it is known to be zeros and holds no numbers."""
    assert torch._efficientzerotensor((2,))._is_zerotensor() and not torch.zeros(2)._is_zerotensor()


@relies_on("._extra_state")
def extra_state() -> None:
    """The name under which a state dict holds what ``get_extra_state`` gives."""
    assert nn.Sequential(_Counting()).state_dict() == {"0._extra_state": 7}


@relies_on("torch._C._are_functorch_transforms_active")
def transforms_of_torch_func() -> None:
    """Says whether a call is within a transform of torch.func, for each of them."""
    active = torch._C._are_functorch_transforms_active
    seen = []

    def square(x: Tensor) -> Tensor:
        seen.append(active())
        return x.square().sum()

    x = torch.ones(2)
    torch.func.vmap(square)(x)
    torch.func.grad(square)(x)
    torch.func.jvp(square, (x,), (x,))
    assert seen == [True, True, True] and not active()


@relies_on("torch.autograd.forward_ad._current_level")
def forward_mode() -> None:
    """Is negative but within a context in which tensors are dual."""
    from torch.autograd import forward_ad

    assert forward_ad._current_level < 0
    with forward_ad.dual_level():
        assert forward_ad._current_level >= 0
    assert forward_ad._current_level < 0


@relies_on("torch._C._functorch.is_legacy_batchedtensor")
def batched_gradients() -> None:
    """Says of a gradient whether it stands for many."""
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: seen.append(torch._C._functorch.is_legacy_batchedtensor(grad)))
    torch.autograd.grad(y, x, torch.ones(2), retain_graph=True)
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [False, True]
