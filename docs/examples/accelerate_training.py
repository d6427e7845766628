"""A network split over all ranks, in a training loop of Hugging Face Accelerate with a DeepSpeed configuration.

torchrun --nproc_per_node 2 docs/examples/accelerate_training.py
"""

import os

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.utils import DeepSpeedEngineWrapper
from torch import Tensor

import tlgc_mp

CLASSES, IMAGES, STEPS, ACCUMULATED = 4, 8, 6, 2
CONFIG = {
    "train_micro_batch_size_per_gpu": IMAGES,
    "gradient_accumulation_steps": ACCUMULATED,
    "tensor_parallel": {"autotp_size": int(os.environ["WORLD_SIZE"])},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Random images, and the number of the brightest quarter of each: the same on every rank of a replica."""
    images = torch.rand(IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(step))
    quarters = torch.nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)
    return images, quarters.argmax(dim=1)


def main() -> None:
    torch.manual_seed(0)  # the same weights on every rank
    engine, *_ = tlgc_mp.initialize(
        model=tlgc_mp.create_model("wrn-10-1", conv="gc-2l", groups=2, num_classes=CLASSES),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        config=CONFIG,
    )
    plugin = DeepSpeedPlugin(hf_ds_config=dict(CONFIG))
    accelerator = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=ACCUMULATED)
    # In place of accelerator.prepare, whose deepspeed.initialize knows nothing of tensor-parallel groups.
    accelerator.deepspeed_engine_wrapped = DeepSpeedEngineWrapper(engine)
    engine.train()
    for step in range(STEPS):
        images, labels = batch(step)
        with accelerator.accumulate(engine):
            loss = torch.nn.functional.cross_entropy(engine(images.to(engine.device)), labels.to(engine.device))
            accelerator.backward(loss)  # and a step, where gradients of ACCUMULATED batches are there
        if torch.distributed.get_rank() == 0:
            print(f"step {step + 1}  loss {loss.item():.4f}  {engine.global_steps} steps of the optimizer")
    accelerator.end_training()


if __name__ == "__main__":
    main()
