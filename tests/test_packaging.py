"""What is installed: a wheel that works from elsewhere, with all that it imports, and a line for what is optional."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tlgc_mp.cli.main import main
from tlgc_mp.cli.mpi import mpi_command
from tlgc_mp.errors import UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CONFIGS = sorted(path.stem for path in (ROOT / "ds_configs").iterdir())


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", re.split(r"[\\[<>=!~; ]", name)[0]).lower()


def declared(extras: bool) -> set[str]:
    found = list(PROJECT["dependencies"])
    if extras:
        found += [each for group in PROJECT["optional-dependencies"].values() for each in group]
    return {canonical(each) for each in found}


def imports(folder: Path, at_import: bool) -> Iterator[tuple[str, Path]]:
    """(top-level module of another project, file that imports it); ``at_import`` leaves out those in functions and
    those for types alone."""
    for path in folder.rglob("*.py"):
        tree = ast.parse(path.read_text())
        inner = {
            node
            for block in ast.walk(tree)
            if isinstance(block, ast.FunctionDef | ast.AsyncFunctionDef)
            or (isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING")
            for node in ast.walk(block)
        }
        for node in ast.walk(tree):
            if at_import and node in inner:
                continue
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names}:
                if name not in sys.stdlib_module_names and name not in ("tlgc_mp", "tests"):
                    yield name, path


@pytest.mark.parametrize(
    ("folder", "at_import", "extras"),
    [("tlgc_mp", True, False), ("tlgc_mp", False, True), ("docs", False, True)],
)
def test_all_that_is_imported_is_declared(folder: str, at_import: bool, extras: bool) -> None:
    """What a module of the package imports at once, the base install has."""
    found = list(imports(ROOT / folder, at_import))
    assert found
    sources = importlib.metadata.packages_distributions()
    wanted = declared(extras)
    for name, path in found:
        projects = {canonical(each) for each in sources.get(name, [name])}
        assert projects & wanted, f"{path} imports {name}, of {projects}: not in pyproject.toml"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the project's wheel is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "tlgc_mp", source / "tlgc_mp", symlinks=True)
    shutil.copytree(ROOT / "ds_configs", source / "ds_configs")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheel = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(wheel, check=True, timeout=200)
    shutil.rmtree(source)
    (built,) = folder.glob("*.whl")
    subprocess.run(
        [*pip, "install", "--no-deps", "--target", str(folder / "site"), str(built)], check=True, timeout=200
    )
    return folder / "site"


def call(installed: Path, *words: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, str(installed / "bin/tlgc-mp"), *words],
        cwd=installed.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.timeout(400)
def test_the_wheel_works_where_it_is_installed(installed: Path) -> None:
    assert "usage: tlgc-mp" in call(installed, "--help")
    listed = dict(line.split(maxsplit=1) for line in call(installed, "config").splitlines())
    assert sorted(listed) == CONFIGS
    for name in CONFIGS:
        text = (ROOT / "ds_configs" / f"{name}.json").read_text()
        assert call(installed, "config", name) == text and json.loads(listed[name]) == json.loads(text)
    counts = json.loads(call(installed, "params", "--model", "wrn-10-1", "--conv", "sc", "--tp", "2"))
    assert counts["total"] > counts["per_rank"] > counts["total"] / 2


def test_a_configuration_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "zero9"]) == 2
    said = f"NAME must be a configuration of the package, got 'zero9'; use one of {', '.join(CONFIGS)}"
    assert capsys.readouterr().err == f"tlgc-mp: error: {said}\n"


@pytest.mark.parametrize(
    ("words", "missing", "extra"),
    [
        (["train", "--dataset", "digits"], "sklearn", "train"),
        (["report", "runs"], "matplotlib", "bench"),
        (["bench", "scaling", "--quick"], "matplotlib", "bench"),
        (["bench", "bandwidth"], "matplotlib", "bench"),
        (["params", "--model", "timm:resnet18", "--conv", "sc"], "timm", "timm"),
    ],
)
def test_what_is_optional_is_named_where_it_is_missing(
    words: list[str], missing: str, extra: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f" needs {missing}, which is not installed; pip install 'tlgc-mp[{extra}]'")
    assert any(canonical(each) for each in PROJECT["optional-dependencies"][extra])


@pytest.fixture
def mpirun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A mpirun that says it is Open MPI's."""
    path = tmp_path / "mpirun"
    path.write_text("#!/bin/sh\necho 'mpirun (Open MPI) 5.0'\n")
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    return path


def test_mpirun_starts_as_many_ranks_as_the_hosts_take(mpirun: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_TEST", "1")
    monkeypatch.setenv("MPIRUN_FLAGS", "--tag-output --mca 'a b' c")
    words = mpi_command(["train", "--epochs", "1"], None, "node1:2,node2:3,node3")
    assert words[:5] == [str(mpirun), "-n", "6", "--host", "node1:2,node2:3,node3"]
    assert words[-6:] == [sys.executable, "-m", "tlgc_mp", "train", "--epochs", "1"]
    assert words[-10:-6] == ["--tag-output", "--mca", "a b", "c"]
    forwarded = {words[index + 1] for index, word in enumerate(words) if word == "-x"}
    assert {"PATH", "NCCL_TEST", "TLGC_MP_VERDICT_FILE"} <= forwarded and "HOME" not in forwarded
    assert mpi_command(["mine", "train"], 2, None)[-2:] == ["mine", "train"]


@pytest.mark.parametrize(
    ("ranks", "hosts", "said"),
    [
        (0, None, "--mpi must be a number of ranks, got 0; use 1 or more"),
        (2, "a:b", "--hosts must be hosts with their numbers of ranks, got 'a:b'; use e.g. node1:2,node2:2"),
    ],
)
def test_ranks_and_hosts_that_cannot_be_are_refused(mpirun: Path, ranks: int, hosts: str | None, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        mpi_command(["train"], ranks, hosts)
    assert str(raised.value) == said


def test_a_missing_mpirun_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UsageError, match="--mpi needs mpirun, which is not installed; install your cluster's MPI, or"):
        mpi_command(["train"], 2, None)
