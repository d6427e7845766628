"""A small U-Net, trained to segment random images, split over all ranks.

torchrun --nproc_per_node 2 docs/examples/segmentation.py
"""

import os

import torch
from torch import Tensor, nn

import tlgc_mp

CLASSES, IMAGES, STEPS = 3, 4, 5


def double(in_channels: int, out_channels: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers += [nn.Conv2d(channels, out_channels, 3, padding=1, bias=False), nn.BatchNorm2d(out_channels), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Logits of each pixel, (B, classes, H, W), of images (B, 3, H, W); 4 divides H and W."""

    def __init__(self, classes: int, width: int = 16) -> None:
        super().__init__()
        self.down = nn.ModuleList([double(3, width), double(width, 2 * width)])
        self.bottom = double(2 * width, 4 * width)
        self.enlarge = nn.ModuleList(
            [nn.ConvTranspose2d(4 * width, 2 * width, 2, 2), nn.ConvTranspose2d(2 * width, width, 2, 2)]
        )
        self.up = nn.ModuleList([double(4 * width, 2 * width), double(2 * width, width)])
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        skipped = []
        for block in self.down:
            x = block(x)
            skipped.append(x)
            x = nn.functional.max_pool2d(x, 2)
        x = self.bottom(x)
        for enlarge, block in zip(self.enlarge, self.up, strict=True):
            x = block(torch.cat([skipped.pop(), enlarge(x)], dim=1))
        return self.head(x)


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random images, and the brightest of the three colours of each pixel: the same on every rank of a replica."""
    images = torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    return images, images.argmax(dim=1)


def main() -> None:
    torch.manual_seed(0)  # the same weights on every rank
    engine, *_ = tlgc_mp.initialize(
        model=UNet(CLASSES),
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=1e-3),
        config={
            "train_batch_size": IMAGES,
            "tensor_parallel": {"autotp_size": int(os.environ["WORLD_SIZE"])},
        },
    )
    engine.train()
    for step in range(STEPS):
        images, classes = batch(step)
        logits = engine(images.to(engine.device))
        loss = nn.functional.cross_entropy(logits, classes.to(engine.device))
        engine.backward(loss)
        engine.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
