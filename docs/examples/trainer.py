"""Your own network, data set and loss in a Trainer, which evaluates, saves, and resumes at the next start.

torchrun --nproc_per_node 2 docs/examples/trainer.py FOLDER --epochs 3
torchrun --nproc_per_node 2 docs/examples/trainer.py FOLDER --epochs 5    # resumes after the third
"""

import argparse

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import Dataset

import tlgc_mp
from tlgc_mp.data import EvaluationBatches, TrainingBatches

CLASSES, SIDE, BATCH = 4, 16, 32


class Corners(Dataset[tuple[Tensor, int]]):
    """Noise with one bright corner; the label is its number. Any data set of (image, label) works."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        generator = torch.Generator().manual_seed(self.seed + index)
        image = torch.randn(3, SIDE, SIDE, generator=generator)
        label = index % CLASSES
        row, column = (label // 2) * SIDE // 2, (label % 2) * SIDE // 2
        image[:, row : row + SIDE // 2, column : column + SIDE // 2] += 0.5
        return image, label


def network() -> nn.Module:
    """A plain network of torch, whose second and third convolutions become two-level group convolutions."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 16), (16, 32), (32, 32)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.1), nn.Linear(32 * 2 * 2, CLASSES))
    return tlgc_mp.convert(model, groups=2)


class FocalTrainer(tlgc_mp.Trainer):
    """Minimizes the focal loss (https://arxiv.org/abs/1708.02002), which gives easy samples less weight."""

    def train_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = (tensor.to(self.engine.device) for tensor in batch)
        losses = nn.functional.cross_entropy(self.engine(images), labels, reduction="none")
        return ((1 - torch.exp(-losses)) ** 2 * losses).mean()

    def evaluate(self) -> dict[str, float]:
        figures = super().evaluate()  # the loss and the error
        confident = torch.zeros(2, dtype=torch.float64, device=self.engine.device)
        for images, _, weights in self.test_batches():
            weights = weights.to(self.engine.device)
            shares = self.engine(images.to(self.engine.device)).softmax(1).amax(1)
            confident += torch.stack([((shares > 0.9) * weights).sum(), weights.sum()])
        dist.all_reduce(confident)  # each replica evaluated a part
        return {**figures, "confident_percent": float(100 * confident[0] / confident[1])}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--tp", type=int, default=2, help="tensor-parallel ranks a replica")
    arguments = parser.parse_args()

    torch.manual_seed(0)  # the same weights on every rank
    engine, *_ = tlgc_mp.initialize(
        model=network(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        config={"train_batch_size": BATCH, "tensor_parallel": {"autotp_size": arguments.tp}},
    )
    group = engine.data_parallel_group  # ranks of one replica read the same batches
    share = {"rank": dist.get_rank(group), "replicas": dist.get_world_size(group)}
    micro_batch = engine.train_micro_batch_size_per_gpu()
    trainer = FocalTrainer(
        engine,
        TrainingBatches(Corners(512, seed=0), batch_size=micro_batch, seed=0, **share),
        EvaluationBatches(Corners(128, seed=10_000), batch_size=64, **share),
        epochs=arguments.epochs,
        folder=arguments.folder,
    )
    trainer.resume()  # where the folder holds a checkpoint
    saved = trainer.train()
    trainer.say(f"The last checkpoint is {saved}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
