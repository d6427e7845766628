"""Every private name of torch and DeepSpeed that the package uses is known, and does what the package relies upon.

Such a name may go, or change, with any release. Then a test here names it, before anything else fails.
"""

from __future__ import annotations

import importlib
import operator
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.module_inject.layers import TensorParallel_Layer
from deepspeed.runtime.engine import DeepSpeedEngine

import tlgc_mp
from tests.versions import rows_deepspeed, rows_gradients, rows_planner, rows_torch  # noqa: F401  (they fill the table)
from tests.versions.private_names import operators_by_name, private_names
from tests.versions.rows import ROWS, Row

PACKAGE = Path(tlgc_mp.__file__).parent
INSTALLED = f"torch {torch.__version__}, DeepSpeed {deepspeed.__version__}"
CLASSES = (TensorParallel_Layer, DeepSpeedEngine, torch.nn.Module, torch.Tensor, torch.autograd.Function)
INHERITED = {name for kind in CLASSES for name in dir(kind)}


def test_every_private_name_has_a_row() -> None:
    known = {name for row in ROWS for name in row.names}
    found = private_names(PACKAGE, INHERITED)
    unknown = {name: places for name, places in found.items() if name not in known}
    assert not unknown, "private names in use without a row in tests/versions/rows_*.py; better, use a public one"
    assert not known - found.keys(), "rows in tests/versions/rows_*.py of names that are not used any more"


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.check.__name__)
def test_what_is_relied_upon(row: Row) -> None:
    missing = [name for name in row.names if not name.startswith(".") and not _exists(name)]
    assert not missing, f"{INSTALLED} has no {', '.join(missing)}"
    try:
        row.check()
    except Exception as error:
        names = ", ".join(name.removeprefix(".") for name in row.names)
        pytest.fail(f"{INSTALLED}: {names}: {type(error).__name__}: {error}. {row.check.__doc__}")


def _exists(name: str) -> bool:
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        try:
            operator.attrgetter(".".join(parts[length:]))(found)
        except AttributeError:
            return False
        return True
    return False


def test_operators_that_rules_name_exist() -> None:
    """A rule of an operator that torch has not is none: it would be computed whole, slowly."""
    names = operators_by_name(PACKAGE)
    assert len(names) > 100
    assert sorted(name for name in names if not _exists(f"torch.ops.aten.{name}")) == [], INSTALLED


def test_names_are_found_wherever_they_stand(tmp_path: Path) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "one.py").write_text(
        "import torch\nfrom torch.utils._pytree import tree_map\nimport torch.nn as nn\n\naten = torch.ops.aten\n\n\n"
        'class Own:\n    _field = 1\n\n    def _method(self):\n        self._set = nn._other\n        return "_set"\n\n'
        "    def _apply(self): ...\n"
    )
    (package / "two.py").write_text(
        "import os\nfrom package.one import Own, aten\n\n\ndef _parameters(own, module, operators):\n"
        '    operators("add _softmax.default")\n    own._method(own._field, own._set, os._exit, own.__dict__, 1_0)\n'
        '    return module._parameters, aten._conj.default, getattr(module, "_flag"), f"_not {module}", "_not a name"\n'
    )
    found = private_names(package, {"_apply", "_set"})
    assert found == {
        "torch.utils._pytree.tree_map": ["package/one.py:2"],
        "torch.nn._other": ["package/one.py:12"],
        "._apply": ["package/one.py:15"],
        "torch.ops.aten._softmax": ["package/two.py:6"],
        "._parameters": ["package/two.py:8"],
        "torch.ops.aten._conj": ["package/two.py:8"],
        "._flag": ["package/two.py:8"],
    }
    assert operators_by_name(package) == {"add", "_softmax.default"}
