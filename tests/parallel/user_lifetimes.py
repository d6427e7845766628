"""What users do with a split network as a whole: copies, files, new layers, other optimizers, errors of their own."""

from __future__ import annotations

import copy
import io
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.parallel.against_one_device import SEED, seed_all
from tests.parallel.user_networks import Classifier, Place
from tlgc_mp.parallel import collectives, split_tensor


def train(model: nn.Module, place: Place, steps: int = 2, **options: Any) -> list[Tensor]:
    """Losses of some steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    losses = []
    seed_all(SEED)
    for step in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(place.images(grad=False, seed=step)), torch.tensor([0, 4, 2]))
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return losses


# Copies and files.


def uses_copies(place: Place) -> Any:
    """A copy has its own weights, learns on its own, and is whole again as the first is."""
    model = place.model(Classifier)
    train(model, place)
    twin = copy.deepcopy(model)
    first = train(twin, place)
    assert not any(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    return first, place.state(model), place.state(twin), model.eval()(place.images()), twin.eval()(place.images())


def uses_averages_of_weights(place: Place) -> Any:
    model = place.model(Classifier)
    mean = AveragedModel(model)
    moving = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for _ in range(2):
        train(model, place)
        mean.update_parameters(model)
        moving.update_parameters(model)
    x = place.images()
    return place.state(mean.module), place.state(moving.module), mean.eval()(x), moving.eval()(x)


def uses_a_saved_network(place: Place) -> Any:
    model = place.model(Classifier)
    train(model, place)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    return train(again, place), place.state(again), again.eval()(place.images()), place.state(model)


def uses_state_dicts(place: Place) -> Any:
    """Of a rank, as they come; and whole ones, in a network of one device."""
    model = place.model(Classifier)
    train(model, place)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    whole = copy.deepcopy(place.state(model))
    train(model, place)
    file.seek(0)
    missing = model.load_state_dict(torch.load(file, weights_only=True))
    alone = Classifier().double()
    alone.load_state_dict(whole)
    x = place.images()
    return list(missing.missing_keys), model.eval()(x), alone.eval()(x), train(model.train(), place)


def uses_a_state_that_is_assigned(place: Place) -> Any:
    """Its tensors take the place of the network's own, and an optimizer over them trains it."""
    model = place.model(Classifier)
    train(model, place)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    train(model, place)
    model.load_state_dict(state, assign=True)
    assert model.norm._buffers["running_mean"] is state["norm.running_mean"]
    return place.state(model), train(model, place), model.eval()(place.images()), place.state(model)


# Changes after the split.


def uses_a_new_head(place: Place) -> Any:
    model = place.model(Classifier)
    train(model, place)
    seed_all(SEED + 1)
    model.fc = nn.Linear(12, 5).double()
    for param in model.features.parameters():
        param.requires_grad_(False)
    model.norm.eval()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    seed_all(SEED)
    for step in range(2):
        optimizer.zero_grad()
        model(place.images(seed=step)).square().sum().backward()
        optimizer.step()
    return place.state(model), [p.grad is None for p in model.features.parameters()]


class _Scaled(torch.autograd.Function):
    """x times a scale of each channel."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, scale)
        return x * scale[:, None, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        x, scale = ctx.saved_tensors
        return grad * scale[:, None, None], (grad * x).sum((0, 2, 3))


def uses_parameters_of_functions_of_their_own(place: Place) -> Any:
    """Trained later, replaced, and assigned with a state: the gradient of each is plain as it is."""

    class Calibrated(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(12), requires_grad=False)

        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return super().forward_head(_Scaled.apply(x, self.scale), pre_logits)

    model, x = place.model(Calibrated), place.images()
    model.scale.requires_grad_(True)
    found = [place.step(model, model(x), x)]
    model.scale = nn.Parameter(torch.linspace(0, 1, 12, dtype=torch.double))
    model.zero_grad()
    found.append(place.step(model, model(x)))
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)
    return *found, place.step(model, model(x))


def uses_weights_set_by_hand(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    with torch.no_grad():
        model.features[0].weight.mul_(0.5)
        model.features[3].weight[1:4, 2] = 0.25
        model.fc.weight.data.copy_(torch.linspace(-1, 1, 60, dtype=torch.double).view(5, 12))
        model.fc.bias += 0.5
        model.norm.running_mean.add_(torch.linspace(0, 1, 12, dtype=torch.double))
    nn.init.zeros_(model.norm.bias)
    return model.eval()(x), place.step(model.train(), model(x), x)


def uses_weights_drawn_again(place: Place) -> Any:
    def initialize(module: nn.Module) -> None:
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            nn.init.uniform_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            nn.init.normal_(module.weight, 1.0, 0.1)

    model, x = place.model(Classifier), place.images()
    train(model, place)
    seed_all(SEED)
    model.apply(initialize)
    return place.state(model), place.step(model, model(x), x)


def uses_other_optimizers(place: Place) -> Any:
    model = place.model(Classifier)
    groups = [
        {"params": [p for n, p in model.named_parameters() if "norm" in n or "bias" in n], "weight_decay": 0.0},
        {"params": [p for n, p in model.named_parameters() if "norm" not in n and "bias" not in n]},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=0.01, weight_decay=0.1, eps=1e-3
    )  # which gradients of zero but for rounding do not reach
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    seed_all(SEED)
    losses = []
    for step in range(3):
        for part in range(2):  # accumulated gradients
            loss = F.cross_entropy(model(place.images(grad=False, seed=step + part)), torch.tensor([0, 4, 2]))
            (loss / 2).backward()
            losses.append(loss.detach())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return losses, place.state(model)


def uses_an_attack(place: Place) -> Any:
    """Images that are trained against a network that is not."""
    model = place.model(Classifier).eval().requires_grad_(False)
    x = place.images()
    for _ in range(2):
        (slope,) = torch.autograd.grad(F.cross_entropy(model(x), torch.tensor([1, 1, 3])), x)
        x = (x + 0.1 * slope.sign()).detach().clamp(-2, 2).requires_grad_()
    return x, model(x)


def uses_a_teacher(place: Place) -> Any:
    """Distillation from a moving average into the network that it is an average of."""
    student = place.model(Classifier)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    seed_all(SEED)
    for step in range(2):
        x = place.images(grad=False, seed=step)
        with torch.no_grad():
            target = teacher(x).softmax(1)
        optimizer.zero_grad()
        F.kl_div(student(x).log_softmax(1), target, reduction="batchmean").backward()
        optimizer.step()
        with torch.no_grad():
            for mine, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                mine.lerp_(theirs, 0.1)
    return place.state(student), place.state(teacher)


# Errors.


class Faulty(Classifier):
    """Fails where it is told to."""

    fault = ""

    def forward(self, x: Tensor) -> Tensor:
        f = self.forward_features(x)
        if self.fault == "own":
            raise CameraError("images of another camera", 17)
        if self.fault == "key":
            return {"a": f}[f.shape[1]]  # type: ignore[index]
        if self.fault == "shape":
            return f + torch.zeros(1, 7, 1, 1, dtype=f.dtype)
        if self.fault == "layer":
            return self.fc(f)
        if self.fault == "write":
            f.sum().backward()
            f.add_(1).sum().backward()
        if self.fault == "stop":
            raise StopIteration
        return self.forward_head(f)


class CameraError(ValueError):
    """An error of a user's own kind."""


def uses_code_that_fails(place: Place) -> Any:
    """The error comes out as it is, and afterwards all is as it was."""
    model, x = place.model(Faulty), place.images()
    told: list[Any] = []
    before = _switches()
    for fault in ("own", "key", "shape", "layer", "write", "stop"):
        model.fault = fault
        seed_all(SEED)
        try:
            model.train()(x)
        except Exception as error:
            theirs = fault in ("shape", "layer", "write")  # torch words what it says of shapes in more than one way
            told.append((type(error).__name__, theirs or error.args, error.__cause__ is None))
        assert _switches() == before
    model.fault = ""
    model.zero_grad()
    x.grad = None
    seed_all(SEED)
    return told, place.step(model, model(x), x), model.eval()(x)


def uses_hooks_that_fail(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    before = _switches()
    told = []

    def fails(*args: Any) -> None:
        raise CameraError("in a hook")

    for register in (model.norm.register_forward_hook, model.fc.register_full_backward_hook):
        handle = register(fails)
        seed_all(SEED)
        try:
            model(x).sum().backward()
        except CameraError as error:
            told.append(str(error))
        handle.remove()
        assert _switches() == before
    model.zero_grad()
    x.grad = None
    seed_all(SEED)
    return told, place.step(model, model(x), x)


def _switches() -> list[Any]:
    """What a pass may leave switched on."""
    modes = torch.overrides._get_current_function_mode_stack()
    plain = torch.ones(2) + 1
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._is_torch_function_enabled(),
        len(modes),
        len(split_tensor.observers),
        len(collectives.recorders),
        type(plain) is Tensor,
    ]
