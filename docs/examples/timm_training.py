"""A network of timm, converted and split over all ranks, trained with timm's own optimizer, schedule, loss and mixup.

torchrun --nproc_per_node 2 docs/examples/timm_training.py
"""

import os

import numpy as np
import timm
import torch
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor

import tlgc_mp

CLASSES, IMAGES, STEPS = 4, 8, 4


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random images, and the number of the brightest quarter of each: the same on every rank of a replica."""
    images = torch.rand(IMAGES, 3, 32, 32, generator=torch.Generator().manual_seed(step))
    quarters = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)
    return images, quarters.argmax(dim=1)


def main() -> None:
    torch.manual_seed(0)  # the same weights on every rank
    model = timm.create_model("test_resnet", num_classes=CLASSES)
    model = tlgc_mp.convert(model, groups=2, init="from_dense")
    # An optimizer over the whole model: initialize has it step this rank's share.
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, momentum=0.9, weight_decay=1e-4)
    engine, optimizer, *_ = tlgc_mp.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": IMAGES,
            "tensor_parallel": {"autotp_size": int(os.environ["WORLD_SIZE"])},
            "zero_allow_untested_optimizer": True,
        },
    )
    schedule = CosineLRScheduler(engine.basic_optimizer, t_initial=STEPS, warmup_t=1, t_in_epochs=False)
    mixup = Mixup(mixup_alpha=0.2, num_classes=CLASSES, label_smoothing=0.1)
    loss_of = SoftTargetCrossEntropy()
    engine.train()
    for step in range(STEPS):
        np.random.seed(step)  # mixup draws from numpy: the same on every rank of a replica
        images, targets = mixup(*batch(step))
        loss = loss_of(engine(images.to(engine.device)), targets.to(engine.device))
        engine.backward(loss)
        engine.step()
        schedule.step_update(step + 1)
        if torch.distributed.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}  rate {engine.get_lr()[0]:.4f}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
