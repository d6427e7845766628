"""Weights go home with torch alone, and a checkpoint can be cut for other ranks without any."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from tests.checkpoint import written
from tests.ranks import run_ranks
from tests.training.runs import metrics, train, train_until
from tlgc_mp.checkpoint import export_checkpoint, load_model, reshard_checkpoint
from tlgc_mp.checkpoint.folder import damage
from tlgc_mp.cli.main import main
from tlgc_mp.errors import UsageError
from tlgc_mp.nn import TwoLevelConv2d

TEST_LOSS_WITHOUT_DEEPSPEED = """
import sys
sys.modules["deepspeed"] = None  # importing it would raise
import torch, torch.nn.functional as F
import tlgc_mp
from tlgc_mp.data import load_datasets

model = tlgc_mp.load_model(sys.argv[1])
test = load_datasets("synthetic", None, seed=0, image_size=8).test
images, labels = zip(*(test[i] for i in range(len(test))))
with torch.no_grad():
    print(F.cross_entropy(model(torch.stack(images)), torch.tensor(labels)).item())
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 2 x 1 ranks at ZeRO 1."""
    folder = tmp_path_factory.mktemp("run") / "run"
    outcomes = run_ranks(2, train, str(folder), "--tp", "2")
    assert [outcome.status for outcome in outcomes] == [0, 0], outcomes[0].stderr
    return folder


@pytest.fixture(scope="module")
def weights(run: Path) -> Path:
    path = run / "model.safetensors"
    assert main(["export", str(run), str(path)]) == 0
    return path


@pytest.mark.timeout(240)
def test_the_exported_model_gives_the_figures_of_the_run(run: Path, weights: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TEST_LOSS_WITHOUT_DEEPSPEED, str(weights)],
        **{"capture_output": True, "text": True, "timeout": 120, "check": True},
    )
    assert float(done.stdout) == pytest.approx(metrics(run)[-1]["test_loss"], rel=1e-6)


@pytest.mark.timeout(240)
def test_torch_export_and_onnx_agree(weights: Path, tmp_path: Path) -> None:
    import onnxruntime

    model = load_model(str(weights))
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(images)
        program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
        torch.testing.assert_close(program.module()(images), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(program.module()(images[:2]), model(images[:2]), rtol=1e-6, atol=1e-6)
    path = tmp_path / "model.onnx"
    torch.onnx.export(program, (), str(path), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.timeout(240)
def test_the_folded_model_computes_the_same(run: Path, weights: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "folded.safetensors")
    assert main(["export", str(run), path, "--fold"]) == 0
    model, folded = load_model(str(weights)), load_model(path)
    assert not any(isinstance(module, TwoLevelConv2d) for module in folded.modules())
    norms = [sum(isinstance(module, nn.BatchNorm2d) for module in each.modules()) for each in (model, folded)]
    assert norms[1] < norms[0] and not folded.training
    images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(folded(images), model(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(UsageError, match="path must be a file of the weights of its model, got "):
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        save_file({name: value for name, value in state.items() if name != "head.bias"}, path, metadata=metadata)
        load_model(path)


@pytest.mark.timeout(240)
def test_cut_for_other_ranks(run: Path, weights: Path, tmp_path: Path) -> None:
    for ranks in (1, 4):
        output = tmp_path / str(ranks)
        assert main(["reshard", str(run), str(output), "--tp", str(ranks)]) == 0
        (folder,) = (output / "checkpoints").glob("epoch-*")
        assert damage(str(folder.parent), folder.name) is None
        assert len(list(folder.glob("shard-*.safetensors"))) == ranks
        export_checkpoint(str(output), str(tmp_path / "again.safetensors"))
        whole, again = load_file(weights), load_file(tmp_path / "again.safetensors")
        assert whole.keys() == again.keys()
        assert all(torch.equal(again[name], value) for name, value in whole.items())


@pytest.mark.timeout(240)
def test_a_run_goes_on_from_what_was_cut(run: Path, tmp_path: Path) -> None:
    """Stopped with two replicas, cut for two tensor-parallel ranks: as the run that was resumed by itself."""
    stopped = run_ranks(2, train_until, (0, 11), str(tmp_path / "run"), "--tp", "1")
    assert stopped[0].status > 128, stopped[0].stderr
    reshard_checkpoint(str(tmp_path / "run"), str(tmp_path / "cut"), 2)
    from_cut = run_ranks(2, train, str(tmp_path / "cut"), "--tp", "2", "--resume")
    assert [outcome.status for outcome in from_cut] == [0, 0], from_cut[0].stderr
    by_itself = run_ranks(2, train, str(tmp_path / "run"), "--tp", "2", "--resume")
    assert [outcome.status for outcome in by_itself] == [0, 0], by_itself[0].stderr
    assert metrics(tmp_path / "cut")[-1]["train_loss"] == metrics(tmp_path / "run")[-1]["train_loss"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "{}/nothing", "{}/out"], "checkpoint must be one, or a folder that holds one, got "),
        (["reshard", "{}/nothing", "{}/out", "--tp", "2"], "checkpoint must be one, or a folder that holds one, got "),
        (["export", "{run}", "{}/file/out"], "output must be a file to write, got "),
        (["reshard", "{run}", "{}/out", "--tp", "3"], "use one of 1, 2, 4"),
        (["reshard", "{run}", "{}/file", "--tp", "2"], "output must be a folder to write, got "),
    ],
)
def test_what_cannot_be_done_is_said_in_a_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (tmp_path / "file").write_text("kept")
    assert main([argument.format(tmp_path, run=run) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and len(err.splitlines()) == 1 and err.startswith("tlgc-mp: error: ") and said in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_damaged_file_is_not_exported(run: Path, tmp_path: Path, weights: Path) -> None:
    shard = run / "checkpoints" / "epoch-2" / "shard-01-00.safetensors"
    content = shard.read_bytes()
    try:
        shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(UsageError, match=r"shard-01-00.*checksum.*epoch-1"):
            export_checkpoint(str(run), str(tmp_path / "out"))
    finally:
        shard.write_bytes(content)
    assert not list(tmp_path.iterdir())
    not_ours = tmp_path / "other.safetensors"
    save_file({"x": torch.zeros(1)}, not_ours)
    with pytest.raises(UsageError, match="does not say which model"):
        load_model(str(not_ours))
    with pytest.raises(UsageError, match="path must be a safetensors file, got "):
        load_model(str(tmp_path / "nothing"))
    assert json.loads((run / "checkpoints" / "epoch-2" / "checkpoint.json").read_text())["format"] == 1


@pytest.mark.parametrize("summed", [False, True])
def test_the_dial_of_a_run_is_kept(summed: bool, tmp_path: Path) -> None:
    state = written.write(tmp_path, coarse_channels=2, coarse_sum=summed)
    export_checkpoint(str(tmp_path), str(tmp_path / "model"))
    model = load_model(str(tmp_path / "model"))
    assert {(m.coarse_channels, m.coarse_sum) for m in model.modules() if isinstance(m, TwoLevelConv2d)} == {
        (2, summed)
    }
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])] == []
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    export_checkpoint(str(tmp_path), str(tmp_path / "folded"), folded=True)
    with torch.no_grad():
        torch.testing.assert_close(load_model(str(tmp_path / "folded"))(images), model(images), rtol=1e-4, atol=1e-4)


def test_layers_that_have_two_names_are_exported_under_both(tmp_path: Path) -> None:
    """CoaT's attention holds layers of the block that it is in."""
    state = written.write(tmp_path, name="timm:coat_lite_tiny", conv="sc", groups=1, coarse_init="zero")
    output = str(tmp_path / "model.safetensors")
    export_checkpoint(str(tmp_path), output)
    model = load_model(output)
    assert len(state) > len([*model.parameters(), *model.buffers()])
    assert [name for name, value in model.state_dict().items() if not torch.equal(value, state[name])] == []
    export_checkpoint(str(tmp_path), output, folded=True)
    images = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(load_model(output)(images), model(images), rtol=1e-4, atol=1e-4)
    assert reshard_checkpoint(str(tmp_path), str(tmp_path / "again"), 1)
