"""Finds the private names of torch and DeepSpeed in the source of a package, without running it.

A name is private where a component of it begins with one underscore. It is written in full where the source says whose
it is (``torch._C.DispatchKey``), and with a dot before it where only a run could tell (``._parameters``, of some
object).
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Collection, Iterator
from pathlib import Path

LIBRARIES = ("torch", "deepspeed")
OPERATOR_LISTS = ("operators", "_positions")
"""Functions of the package whose first argument names operators of ``torch.ops.aten``, separated by blanks."""

_WORD = re.compile(r"_[A-Za-z]\w*")


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") and part != "_" for part in name.split("."))


def _operator(name: str) -> str:
    """Of ``torch.ops.aten``, without its overload."""
    return ".".join(name.split(".")[:4]) if name.startswith("torch.ops.aten.") else name


class _File:
    """One module of the package: what its names stand for, and which private names are its own."""

    def __init__(self, path: Path, package: Path) -> None:
        self.path = path.relative_to(package.parent)
        self.tree = ast.parse(path.read_text())
        self.module = ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")
        self.stands_for: dict[str, str] = {}
        self.imports: set[str] = set()
        self.own: set[str] = set()
        self.methods: set[str] = set()
        for node in ast.walk(self.tree):
            self._read(node)

    def _read(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                self.imports.add(alias.name)
                if alias.asname:
                    self.stands_for[alias.asname] = alias.name
                else:
                    root = alias.name.split(".")[0]
                    self.stands_for[root] = root
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                self.imports.update((node.module, f"{node.module}.{alias.name}"))
                self.stands_for[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ClassDef):
            self.methods.update(part.name for part in node.body if isinstance(part, ast.FunctionDef))
            fields = [part.target for part in node.body if isinstance(part, ast.AnnAssign)]
            fields += [target for part in node.body if isinstance(part, ast.Assign) for target in part.targets]
            self.own.update(self.methods, (field.id for field in fields if isinstance(field, ast.Name)))
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node.value):
            self.own.add(node.attr)

    def aliases(self) -> dict[str, str]:
        """Names of the module that stand for something of a library, as ``aten = torch.ops.aten`` has it."""
        found = {}
        for node in self.tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute):
                full = self.resolved(node.value)
                for target in node.targets:
                    if full and isinstance(target, ast.Name):
                        found[target.id] = full
        return found

    def resolved(self, node: ast.expr) -> str | None:
        """The dotted name of an expression that begins with an imported name."""
        if isinstance(node, ast.Name):
            return self.stands_for.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self.resolved(node.value)
            return f"{base}.{node.attr}" if base else None
        return None


def _is_own(name: str, own: Collection[str]) -> bool:
    return name in own or "tlgc_mp" in name


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def private_names(package: Path, inherited: Collection[str]) -> dict[str, list[str]]:
    """Each private name of a library that the package uses -> where it does, as ``file:line``.

    Args:
        package: its folder.
        inherited: names of methods of the libraries' classes, of which a method of the package takes the place.
    """
    files = [_File(path, package) for path in sorted(package.rglob("*.py"))]
    of_module = {file.module: file for file in files}
    for file in files:
        aliases = file.aliases()
        file.stands_for.update(aliases)
        for name, full in list(file.stands_for.items()):
            module, _, last = full.rpartition(".")
            if module in of_module:
                file.stands_for[name] = of_module[module].aliases().get(last, full)
    found: dict[str, list[str]] = defaultdict(list)
    for file in files:
        own = file.own.union(*(of_module[name].own for name in file.imports if name in of_module))
        for name, line in _uses(file, own, inherited):
            found[name].append(f"{file.path}:{line}")
    return dict(found)


def _uses(file: _File, own: Collection[str], inherited: Collection[str]) -> Iterator[tuple[str, int]]:
    inside: set[ast.AST] = set()  # of a longer name, or of a list of operators, that has been seen
    for node in ast.walk(file.tree):
        if node in inside:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in LIBRARIES:
            for alias in node.names:
                if is_private(f"{node.module}.{alias.name}"):
                    yield f"{node.module}.{alias.name}", node.lineno
        elif isinstance(node, ast.Attribute):
            full = file.resolved(node)
            if full:
                inside.update(ast.walk(node))
                if full.split(".")[0] in LIBRARIES and is_private(full):
                    yield _operator(full), node.lineno
            elif is_private(node.attr) and not _is_own(node.attr, own):
                yield f".{node.attr}", node.lineno
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in OPERATOR_LISTS:
            for word in operator_words(node):
                if is_private(word):
                    yield _operator(f"torch.ops.aten.{word}"), node.lineno
            inside.update(ast.walk(node))
        elif isinstance(node, ast.JoinedStr):
            inside.update(ast.walk(node))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _WORD.fullmatch(node.value):
            if is_private(node.value) and not _is_own(node.value, own):
                yield f".{node.value}", node.lineno
        elif isinstance(node, ast.FunctionDef) and is_private(node.name) and node.name in file.methods & set(inherited):
            yield f".{node.name}", node.lineno


def operator_words(call: ast.Call) -> list[str]:
    """The operators that a call of one of :data:`OPERATOR_LISTS` names, if it names any itself."""
    first = call.args[0] if call.args else None
    return first.value.split() if isinstance(first, ast.Constant) and isinstance(first.value, str) else []


def operators_by_name(package: Path) -> set[str]:
    """All operators that the package names in lists."""
    trees = [ast.parse(path.read_text()) for path in package.rglob("*.py")]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    lists = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in OPERATOR_LISTS]
    return {word for call in lists for word in operator_words(call)}
