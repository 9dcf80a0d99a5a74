"""What docstrings and documents name is there: files, and classes and functions by their module or class."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PACKAGES = ("runtime", "kernels", "export", "training")
FILE = re.compile(r"[\w./-]*\w\.py")
ALIASES = ("np", "nn", "tl", "F", "trt", "ort")  # of other people's modules
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(?<!\.json)(?<!\.onnx)(?<!\.data)")


@functools.cache
def _modules(root: Path) -> dict[str, list[str]]:
    """The last name of every module and package -> where it can be imported from."""
    modules: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules.setdefault(parts[-1], []).append(".".join(("iedit", *parts)))
    return modules


@functools.cache
def _definitions(root: Path) -> dict[str, list[str]]:
    """Every class and function of a module -> the modules that define it."""
    definitions: dict[str, list[str]] = {}
    for names in _modules(root).values():
        for name in names:
            path = root.joinpath(*name.split(".")[1:])
            path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
            for node in ast.parse(path.read_text(encoding="utf-8")).body if path.is_file() else []:
                if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                    definitions.setdefault(node.name, []).append(name)
    return definitions


def _has(owner: Any, names: list[str]) -> bool:
    """Whether `owner` has the attribute chain; of a class also fields and what its methods set on self."""
    if not names:
        return True
    first, *rest = names
    if hasattr(owner, first):
        return _has(getattr(owner, first), rest)
    if isinstance(owner, ModuleType):
        with contextlib.suppress(ImportError):
            return _has(importlib.import_module(f"{owner.__name__}.{first}"), rest)
        # `profile.evaluations`: the field of an object that is called like the module of its class.
        own = [c for c in vars(owner).values() if inspect.isclass(c) and c.__module__ == owner.__name__]
        return any(_has(c, names) for c in own)
    if not inspect.isclass(owner):
        return True  # an attribute of an instance: nothing is known of it here
    fields = {name for base in owner.__mro__ for name in inspect.get_annotations(base)}
    return first in fields or re.search(rf"self\.{first}\b", inspect.getsource(owner)) is not None


def _docstrings(path: Path) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "name", "the module"), text


def _quoted(text: str) -> list[str]:
    return [q.split("(")[0].strip() for q in re.findall(r"`([^`\n]+)`", text)]


@pytest.mark.parametrize("folder", [*PACKAGES, "bench", "tests"])
def test_what_a_docstring_names_is_there(root: Path, folder: str) -> None:
    modules = _modules(root)
    definitions = _definitions(root)
    files = {
        path.relative_to(root).as_posix()
        for top in (*PACKAGES, "bench", "tests")
        for path in (root / top).rglob("*.py")
    }
    wrong = []
    for path in sorted((root / folder).rglob("*.py")):
        for where, text in _docstrings(path):
            for name in _quoted(text):
                if FILE.fullmatch(name):
                    there = any(f == name or f.endswith(f"/{name}") for f in files)
                elif DOTTED.fullmatch(name):
                    first, *rest = name.removeprefix("iedit.").split(".")
                    owners = [importlib.import_module(m) for m in modules.get(first, [])]
                    owners += [getattr(importlib.import_module(m), first) for m in definitions.get(first, [])]
                    # Of what is no module of ours nothing is known, unless what it is said to hold is ours.
                    foreign = rest[0] not in definitions and not rest[0][0].isupper()
                    foreign |= first in ALIASES or importlib.util.find_spec(first) is not None
                    there = any(_has(owner, rest) for owner in owners) if owners else foreign
                else:
                    continue
                if not there:
                    wrong.append(f"{path.relative_to(root)}, {where}: `{name}`")
    assert not wrong, "\n".join(wrong)


def test_every_file_that_a_document_names_is_there(root: Path) -> None:
    files = {
        path.relative_to(root).as_posix()
        for top in (*PACKAGES, "bench", "tests")
        for path in (root / top).rglob("*.py")
    }
    wrong = []
    for path in (root / "README.md", root / "CONTRIBUTING.md", *sorted((root / "docs").glob("*.md"))):
        for name in re.findall(r"`(?:[\w ]* )?([\w./-]*\w\.py)\b", path.read_text(encoding="utf-8")):
            if not any(f == name or f.endswith(f"/{name}") for f in files):
                wrong.append(f"{path.name}: `{name}`")
    assert not wrong, "\n".join(wrong)
