"""A checkpoint loads at the shape that wrote it, bit for bit, and at every other, to rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.checkpoint.engines import Kind, Run, Shape, load_all, save_and_load
from tests.ranks import run_ranks

FIRST, LAST = 4, 7  # one milestone of the rate before the checkpoint, one after it
TOLERANCE = 1e-5
SPLITS = ((2, 1), (1, 2), (2, 2))
KINDS: list[Kind] = [(Shape(p, d, stage), "sgd", "fp32") for p, d in SPLITS for stage in (0, 1, 2, 3)]
KINDS += [(Shape(*shape), "sgd", "bf16") for shape in ((2, 1, 0), (2, 2, 0), (1, 2, 2), (2, 2, 3))]
KINDS += [(Shape(2, 2, stage), optimizer, "fp32") for optimizer in ("adam", "adamw") for stage in (0, 1, 3)]
KINDS += [(Shape(2, 1, 0), "plain-sgd", "fp32"), (Shape(4, 1, 1), "sgd", "fp32")]
KINDS += [(Shape(2, 1, stage), "two-groups", "fp32") for stage in (0, 2, 3)]
KINDS += [(Shape(1, 2, stage), optimizer, "offload") for stage, optimizer in ((1, "sgd"), (3, "adam"))]
OTHERS: list[tuple[Kind, Shape]] = [
    ((Shape(2, 2, 1), "sgd", "fp32"), Shape(4, 1, 0)),
    ((Shape(2, 1, 0), "sgd", "fp32"), Shape(4, 1, 3)),
    ((Shape(2, 2, 1), "sgd", "fp32"), Shape(1, 1, 0)),
    ((Shape(4, 1, 1), "sgd", "fp32"), Shape(1, 1, 3)),
    ((Shape(4, 1, 1), "sgd", "fp32"), Shape(2, 1, 1)),
    ((Shape(2, 1, 3), "sgd", "fp32"), Shape(1, 2, 1)),
    ((Shape(2, 2, 3), "adam", "fp32"), Shape(1, 2, 1)),
    ((Shape(1, 2, 2), "sgd", "fp32"), Shape(2, 1, 3)),
    ((Shape(2, 2, 0), "adamw", "fp32"), Shape(2, 1, 2)),
    ((Shape(2, 2, 1), "adam", "fp32"), Shape(1, 4, 3)),
    ((Shape(2, 1, 0), "two-groups", "fp32"), Shape(1, 2, 3)),
    ((Shape(2, 1, 3), "two-groups", "fp32"), Shape(1, 2, 2)),
]

Saved = Callable[[Kind], tuple[Run, Run]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def saved(folder: Path) -> Saved:
    """A kind of run -> (the run that went on, the one that was loaded at its own shape); runs its P x D once."""

    @functools.cache
    def outcomes(tensor_parallel: int, data_parallel: int) -> dict[Kind, tuple[Run, Run]]:
        kinds = [k for k in KINDS if (k[0].tensor_parallel, k[0].data_parallel) == (tensor_parallel, data_parallel)]
        found: dict[Kind, tuple[Run, Run]] = run_ranks(
            tensor_parallel * data_parallel, save_and_load, kinds, str(folder), FIRST, LAST, timeout=200
        )[0]
        return found

    return lambda kind: outcomes(kind[0].tensor_parallel, kind[0].data_parallel)[kind]


@pytest.mark.timeout(240)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_at_its_own_shape_bit_for_bit(saved: Saved, kind: Kind) -> None:
    whole, loaded = saved(kind)
    assert loaded.losses == whole.losses
    assert loaded.rate == whole.rate
    assert loaded.state.keys() == whole.state.keys()
    for name, value in whole.state.items():
        assert torch.equal(loaded.state[name], value), name


@pytest.mark.timeout(240)
@pytest.mark.parametrize("split", sorted({(o.tensor_parallel, o.data_parallel) for _, o in OTHERS}), ids=str)
def test_at_another_shape_to_rounding(saved: Saved, folder: Path, split: tuple[int, int]) -> None:
    chosen = [(kind, other) for kind, other in OTHERS if (other.tensor_parallel, other.data_parallel) == split]
    kinds, others = [kind for kind, _ in chosen], [other for _, other in chosen]
    runs = [saved(kind)[0] for kind in kinds]
    for ranks in run_ranks(split[0] * split[1], load_all, kinds, others, str(folder), LAST, timeout=200):
        for kind, whole, loaded in zip(kinds, runs, ranks, strict=True):
            assert loaded.losses == pytest.approx(whole.losses, rel=TOLERANCE), kind
            assert loaded.rate == whole.rate
            for name, value in whole.state.items():
                if (
                    "running" not in name and "num_batches" not in name
                ):  # see an image more often, or less, at another D
                    torch.testing.assert_close(
                        loaded.state[name],
                        value,
                        rtol=1e-3,
                        atol=1e-6,
                        msg=functools.partial("{}, {}: {}".format, kind, name),
                    )
