"""A network split over all ranks, trained by Lightning with its DeepSpeed strategy.

torchrun --nproc_per_node 2 docs/examples/lightning_training.py
"""

import os

import lightning
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import tlgc_mp

CLASSES, IMAGES, STEPS = 4, 8, 4
RANKS = int(os.environ["WORLD_SIZE"])
CONFIG = {
    "train_micro_batch_size_per_gpu": IMAGES,
    "tensor_parallel": {"autotp_size": RANKS},
    "zero_optimization": {"stage": 1},
    "zero_allow_untested_optimizer": True,
}


class TensorParallelStrategy(DeepSpeedStrategy):
    """Lightning's DeepSpeed strategy, whose engine is tlgc_mp's."""

    def setup_environment(self) -> None:
        # Lightning's own wants GPUs; DeepSpeed does not.
        super(DeepSpeedStrategy, self).setup_environment()

    def _init_deepspeed_distributed(self) -> None:
        # DeepSpeed's own compiles an extension on CPUs; tlgc_mp.initialize goes on from torch's groups without it.
        torch.distributed.init_process_group(self._get_process_group_backend())

    def _setup_model_and_optimizer(
        self, model: nn.Module, optimizer: Optimizer | None, lr_scheduler: object = None
    ) -> tuple[nn.Module, Optimizer]:
        engine, stepped, *_ = tlgc_mp.initialize(
            model=model, optimizer=optimizer, lr_scheduler=lr_scheduler, config=self.config, dist_init_required=False
        )
        return engine, stepped

    @property
    def distributed_sampler_kwargs(self) -> dict[str, int]:
        """All ranks of a replica take the same batches."""
        return {"num_replicas": self.world_size // RANKS, "rank": self.global_rank // RANKS}


class Classifier(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = tlgc_mp.create_model("wrn-10-1", conv="gc-2l", groups=2, num_classes=CLASSES)

    def training_step(self, batch: tuple[Tensor, Tensor], number: int) -> Tensor:
        images, labels = batch
        loss = nn.functional.cross_entropy(self.model(images), labels)
        self.print(f"step {number + 1}  loss {loss.item():.4f}")
        return loss

    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main() -> None:
    torch.manual_seed(0)  # the same weights on every rank
    images = torch.rand(IMAGES * STEPS, 3, 16, 16)
    quarters = nn.functional.adaptive_avg_pool2d(images.mean(dim=1, keepdim=True), 2).flatten(1)
    loader = DataLoader(TensorDataset(images, quarters.argmax(dim=1)), batch_size=IMAGES)
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    devices = [torch.device(kind, index) for index in range(local)]
    trainer = lightning.Trainer(
        strategy=TensorParallelStrategy(config=CONFIG, parallel_devices=devices),
        devices=local,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier(), loader)


if __name__ == "__main__":
    main()
