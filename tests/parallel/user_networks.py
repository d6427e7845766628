"""Networks of users: what their code does in a forward pass, with hooks, and with weights.

Each function ``uses_*`` builds a network with the initial weights of :data:`SEED`, has it split where the
:class:`Place` that it gets says so, and returns what came out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.ops
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.parallel.against_one_device import SEED, make_values_differ, scalar_loss, seed_all, whole_gradients
from tlgc_mp.parallel import gather_state_dict, shard


class Place:
    """Where a network runs: on one device, or split over the ranks of the default group."""

    def __init__(self, split: bool) -> None:
        self.split = split

    def model(self, make: Callable[[], nn.Module]) -> Any:
        """The network that ``make`` builds, split or not."""
        seed_all(SEED)
        model = make().double()
        make_values_differ(model, SEED)
        seed_all(SEED)
        return self.shard(model)

    def shard(self, model: nn.Module) -> Any:
        return shard(model, timeout=20.0) if self.split else model

    def images(self, *shape: int, grad: bool = True, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(shape or (3, 4, 8, 8), generator=generator, dtype=torch.float64).requires_grad_(grad)

    def step(self, model: nn.Module, outputs: Any, *inputs: Tensor) -> list[Any]:
        """The outputs, the gradients of inputs and parameters, and the state after a step of SGD."""
        loss = scalar_loss(outputs)
        assert loss is not None
        loss.backward()
        found = [outputs, [x.grad for x in inputs], whole_gradients(model)]
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        return [*found, self.state(model)]

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        return gather_state_dict(model)


def body(channels: int = 4, width: int = 12) -> list[nn.Module]:
    """A convolution, a BatchNorm and another convolution."""
    return [
        nn.Conv2d(channels, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.SiLU(),
        nn.Conv2d(width, width, 3, padding=1),
    ]


class Classifier(nn.Module):
    """A network as users write them, with its parts as methods."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(*body())
        self.norm = nn.BatchNorm2d(12)
        self.drop = nn.Dropout(0.2)
        self.fc = nn.Linear(12, 5)

    def forward_features(self, x: Tensor) -> Tensor:
        return self.norm(self.features(x)).tanh()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.drop(x.mean((2, 3)))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


# When and how a network is called.


def uses_evaluation_before_training(place: Place) -> Any:
    class Auxiliary(Classifier):
        """Joins channels in training, and cuts them in evaluation."""

        def forward(self, x: Tensor) -> Any:
            f = self.forward_features(x)
            if self.training:
                return self.forward_head(f), torch.cat([f, f.flip(1)], 1)[:, 3:17]
            return self.fc(f.mean((2, 3)) / f.flatten(1).norm(dim=1, keepdim=True))

    model, x = place.model(Auxiliary), place.images()
    with torch.no_grad():
        before = model.eval()(x)
    seed_all(SEED)
    trained = place.step(model, model.train()(x), x)
    return before, trained, model.eval()(x)


def uses_inference_mode(place: Place) -> Any:
    model, x = place.model(Classifier), place.images(grad=False)
    with torch.inference_mode():
        first = model.eval()(x)
    seed_all(SEED)
    return first, place.step(model, model.train()(x))


def uses_parts_alone(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    f = model.forward_features(x)
    pooled = model.forward_head(f, pre_logits=True)
    first = model.features[0](x)
    return place.step(model, [f * 1.0, pooled * 2.0, model.fc(pooled), first.softmax(1), model.features(x)], x)


def uses_keywords_dicts_and_none(place: Place) -> Any:
    class Named(Classifier):
        def forward(self, batch: dict[str, Any], *, scale: float = 1.0, mask: Tensor | None = None) -> Any:
            f = self.forward_features(batch["image"])
            logits = self.fc(input=f.mean((2, 3)) * scale)
            return {"logits": logits, "none": None, "size": f.shape[1], "all": (f, [batch["name"], mask])}

    model, x = place.model(Named), place.images()
    return place.step(model, model({"image": x, "name": "a"}, scale=0.5), x), model({"image": x, "name": "b"}, mask=x)


def uses_a_part_of_a_larger_network(place: Place) -> Any:
    """A split model inside of a module that is not."""
    model, x = place.model(Classifier), place.images()
    outer = nn.Sequential(nn.Conv2d(4, 4, 1), model, nn.Linear(5, 3)).double()
    with torch.no_grad():
        for param in (*outer[0].parameters(), *outer[2].parameters()):
            param.fill_(0.1)
    return place.step(outer, outer(x), x)


def uses_two_passes_and_one_backward(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    one, other = model(x), model(x.flip(0) * 0.5)
    return place.step(model, [F.pairwise_distance(one, other), F.cosine_similarity(one, other)], x)


def uses_layers_twice_and_ties(place: Place) -> Any:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 12, 3, padding=1)
            self.mix = nn.Conv2d(12, 12, 3, padding=1)
            self.again = self.mix
            self.back = nn.ConvTranspose2d(12, 4, 3, padding=1)
            self.back.weight = self.conv.weight
            self.embed, self.head = nn.Embedding(6, 12), nn.Linear(12, 6, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x: Tensor, words: Tensor) -> Any:
            y = self.mix(self.again(self.mix(self.conv(x)).relu()))
            return self.back(y), self.head(y.mean((2, 3)) + self.embed(words))

    model, x = place.model(Tied), place.images()
    return place.step(model, model(x, torch.tensor([0, 3, 5])), x)


# Code between layers.


def uses_views_and_writes(place: Place) -> Any:
    class Writes(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            f = self.features(x)
            g = f.clone()
            g[:, 0] = 0
            g[:, 1::3] *= 2
            g.view(g.shape[0], 4, 3, *g.shape[2:])[:, :, 1].add_(f[:, :4])
            g.permute(0, 2, 3, 1)[..., -1].mul_(0.5)
            g.masked_fill_(g > 2, 1.5)
            out = torch.zeros(len(x), 14, *g.shape[2:], dtype=x.dtype)
            out[:, 1:13] = g
            out[:, 0].copy_(f.mean(1))
            return self.fc(out[:, 2:].relu_().mean((2, 3)))

    model, x = place.model(Writes), place.images()
    return place.step(model, model(x), x)


def uses_values_in_python(place: Place) -> Any:
    class Reads(Classifier):
        def forward(self, x: Tensor) -> Any:
            f = self.forward_features(x)
            scores = f.mean((2, 3))
            order = sorted(range(scores.shape[1]), key=lambda c: scores[0, c].item())
            best = [int(c) for c in scores.sum(0).topk(3).indices]
            counts = {c: (f[:, c] > 0.1).sum().item() for c in best}
            if scores.std() > 1e-6 and bool((scores > -9).all()):
                f = f[:, order] * scores.shape[1] ** -0.5
            return self.fc(f.mean((2, 3))), best, counts, float(scores.max()), len(f), scores.tolist()[0][:3]

    model, x = place.model(Reads), place.images()
    return place.step(model, model(x), x)


def uses_a_detector(place: Place) -> Any:
    """Takes a list of images and of targets, gives losses in training and boxes in evaluation."""

    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head = nn.Sequential(*body()), nn.Conv2d(12, 5, 1)
            self.classify = nn.Linear(12 * 4, 3)

        def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
            sides = [max(image.shape[i] for image in images) for i in (1, 2)]
            batch = torch.stack([F.pad(i, (0, sides[1] - i.shape[2], 0, sides[0] - i.shape[1])) for i in images])
            features = self.body(batch)
            found = self.head(features).permute(0, 2, 3, 1).flatten(1, 2)
            corners = found[..., :2].sigmoid() * 4
            boxes = torch.cat([corners, corners + 1 + found[..., 2:4].exp().clamp(max=4)], -1)
            if targets is not None:
                pairs = [torchvision.ops.box_iou(b, t["boxes"]).max(1) for b, t in zip(boxes, targets, strict=True)]
                losses = [
                    F.binary_cross_entropy_with_logits(s, i.values) for s, i in zip(found[..., 4], pairs, strict=True)
                ]
                regions = torchvision.ops.roi_align(features, [t["boxes"] for t in targets], 2)
                kind = F.cross_entropy(self.classify(regions.flatten(1)), torch.cat([t["labels"] for t in targets]))
                return {"score": sum(losses), "kind": kind}
            results = []
            for box, score in zip(boxes, found[..., 4], strict=True):
                keep = torchvision.ops.nms(box, score, 0.3)[:3]
                results.append({"boxes": box[keep], "scores": score[keep].sigmoid()})
            return results

    model = place.model(Detector)
    images = [place.images(4, 7, 8), place.images(4, 8, 6, seed=1)]
    targets = [
        {"boxes": torch.tensor([[0.0, 1, 3, 4], [2, 2, 6, 5]]).double(), "labels": torch.tensor([0, 2])},
        {"boxes": torch.tensor([[1.0, 1, 5, 6]]).double(), "labels": torch.tensor([1])},
    ]
    return place.step(model, model(images, targets), *images), model.eval()(images)


def uses_checkpoints(place: Place) -> Any:
    class Blocks(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            x = checkpoint(self.features, x, use_reentrant=True)
            x = checkpoint(lambda y: F.normalize(self.norm(F.dropout(y, 0.3))), x, use_reentrant=False)
            x = checkpoint_sequential(nn.Sequential(nn.Tanh(), self.features[3], nn.SiLU()), 2, x, use_reentrant=False)
            return self.forward_head(x)

    model, x = place.model(Blocks), place.images()
    return place.step(model, model(x), x)


# Hooks.


def uses_hooks_that_mix_channels(place: Place) -> Any:
    model = place.model(Classifier)
    seen: dict[str, Any] = {}

    def mixed(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        seen["shape"] = tuple(out.shape)
        return F.normalize(out, dim=1) + args[0].mean(1, keepdim=True)

    handles = [
        model.features[0].register_forward_hook(mixed),
        model.features[3].register_forward_pre_hook(lambda module, args: (args[0].flip(1),)),
        model.fc.register_forward_hook(lambda m, args, kwargs, out: out.softmax(-1), with_kwargs=True),
        model.register_forward_hook(lambda module, args, out: out * out.shape[-1]),
    ]
    x = place.images()
    first = place.step(model, model(x), x)
    for handle in handles:
        handle.remove()
    return first, seen, model.eval()(x)


def uses_backward_hooks_that_mix_channels(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    norms: list[Tensor] = []

    def clipped(module: nn.Module, inputs: Any, outputs: Any) -> Any:
        norms.append(outputs[0].norm(dim=1).sum())
        return (inputs[0] / (1 + inputs[0].norm()),)

    model.features[3].register_full_backward_hook(clipped)
    model.norm.register_full_backward_pre_hook(lambda module, outputs: (outputs[0] - outputs[0].mean(1, keepdim=True),))
    return place.step(model, model(x), x), [norm * 1 for norm in norms]


def uses_hooks_of_tensors_and_kept_features(place: Place) -> Any:
    """Grad-CAM, with the features and their gradients read outside of the network."""
    model, x = place.model(Classifier), place.images()
    kept: dict[str, Tensor] = {}

    def keep(module: nn.Module, args: Any, out: Tensor) -> None:
        out.register_hook(lambda grad: grad * (grad > grad.mean(1, keepdim=True)))
        out.retain_grad()
        kept["features"] = out

    model.features.register_forward_hook(keep)
    logits = model.eval()(x)
    logits[:, 2].sum().backward(retain_graph=True)
    features, gradient = kept["features"], kept["features"].grad
    assert gradient is not None
    cam = (features * gradient.mean((2, 3), keepdim=True)).sum(1).relu()
    slope = torch.autograd.grad(logits[:, 1].sum(), features)[0]
    return logits, cam, cam.detach().numpy().sum(), slope.abs().amax((0, 2, 3)), x.grad, whole_gradients(model)


def uses_hooks_of_all_modules(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    shapes: list[Any] = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, args, out: shapes.append((type(module).__name__, tuple(out.shape))) or out * 0.9
    )
    try:
        found = model(x)
    finally:
        handle.remove()
    return place.step(model, found, x), shapes


# Weights that others read, or that are computed.


def uses_weights_in_the_loss(place: Place) -> Any:
    model, x = place.model(Classifier), place.images()
    filters = model.features[3].weight.flatten(1)
    apart = (F.normalize(filters) @ F.normalize(filters).t() - torch.eye(12, dtype=torch.double)).pow(2).sum()
    sparse = model.norm.weight.abs().sum() + model.fc.weight.pow(2).sum() * model.fc.bias.norm()
    return place.step(model, [model(x), apart * 0.1 + sparse * 0.2], x)


def uses_angular_margins(place: Place) -> Any:
    class Margin(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.centres = nn.Parameter(torch.randn(7, 12))

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            f = F.normalize(self.forward_head(self.forward_features(x), pre_logits=True))
            cosine = F.linear(f, F.normalize(self.centres)) + F.linear(f, self.fc.weight).mean(1, keepdim=True)
            turned = (cosine.clamp(-0.9, 0.9).acos() + 0.3).cos()
            return F.cross_entropy(8 * torch.where(F.one_hot(labels, 7).bool(), turned, cosine), labels)

    model, x = place.model(Margin), place.images()
    return place.step(model, model(x, torch.tensor([1, 6, 2])), x)


def uses_pruned_and_parametrized_weights(place: Place) -> Any:
    def make() -> nn.Module:
        model = Classifier()
        prune.ln_structured(model.features[0], "weight", amount=0.3, n=2, dim=0)
        prune.random_unstructured(model.fc, "weight", amount=0.4)
        prune.random_unstructured(model.fc, "bias", amount=0.4)
        parametrizations.spectral_norm(model.features[3])
        return model

    model, x = place.model(make), place.images()
    trained = place.step(model, model(x), x)
    return trained, model.features[0].weight * 1, model.fc.weight_mask.sum(), model.eval()(x)


def uses_gradient_penalties(place: Place) -> Any:
    """A step of WGAN-GP: gradients of gradients, through two split networks."""

    def critic() -> nn.Module:
        return nn.Sequential(*body(), nn.Softplus(), nn.Flatten(), nn.Linear(12 * 64, 1))

    def generator() -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 8 * 16), nn.Unflatten(1, (8, 4, 4)), nn.ConvTranspose2d(8, 4, 4, 2, 1), nn.Tanh()
        )

    judge, maker, real = place.model(critic), place.model(generator), place.images(grad=False)
    noise = torch.randn(3, 6, dtype=torch.double)
    fake = maker(noise)
    share = torch.rand(3, 1, 1, 1, dtype=torch.double)
    between = (share * real + (1 - share) * fake.detach()).requires_grad_()
    (slope,) = torch.autograd.grad(judge(between).sum(), between, create_graph=True)
    penalty = (slope.flatten(1).norm(dim=1) - 1).pow(2).mean()
    first = place.step(judge, judge(fake.detach()).mean() - judge(real).mean() + 10 * penalty)
    return penalty, slope, first, place.step(maker, -judge(maker(noise)).mean())
