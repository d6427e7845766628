"""A detector of torchvision, trained on random images, split over all ranks.

torchrun --nproc_per_node 2 docs/examples/detector.py
"""

import os

import torch
from torchvision.models.detection import fasterrcnn_mobilenet_v3_large_320_fpn

import tlgc_mp

CLASSES, IMAGES, STEPS = 4, 2, 3


def batch(step: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Random images, each with one box: the same on every rank of a replica."""
    generator = torch.Generator().manual_seed(step)
    images = [torch.rand(3, 96, 96, generator=generator) for _ in range(IMAGES)]
    corners = torch.rand(IMAGES, 1, 2, generator=generator) * 48
    labels = torch.randint(1, CLASSES, (IMAGES, 1), generator=generator)
    boxes = torch.cat([corners, corners + 40], dim=-1)  # (image, box, x1 y1 x2 y2), pixels
    return images, [{"boxes": boxes[i], "labels": labels[i]} for i in range(IMAGES)]


def main() -> None:
    torch.manual_seed(0)  # the same weights on every rank
    model = fasterrcnn_mobilenet_v3_large_320_fpn(
        weights=None, weights_backbone=None, num_classes=CLASSES, min_size=96, max_size=96
    )
    engine, *_ = tlgc_mp.initialize(
        model=model,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
        config={
            "train_batch_size": IMAGES,
            "tensor_parallel": {"autotp_size": int(os.environ["WORLD_SIZE"])},
        },
    )
    engine.train()
    for step in range(STEPS):
        torch.manual_seed(step)  # of the proposals that it samples
        images, targets = batch(step)
        images = [image.to(engine.device) for image in images]
        targets = [{name: value.to(engine.device) for name, value in target.items()} for target in targets]
        losses = engine(images, targets)
        loss = sum(losses.values())
        engine.backward(loss)
        engine.step()
        if torch.distributed.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}  {', '.join(losses)}")
    engine.eval()
    with torch.no_grad():
        found = engine(images)
    if torch.distributed.get_rank() == 0:
        print(f"{len(found)} images, {sum(len(each['boxes']) for each in found)} boxes found")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
