"""docs/architecture.md says what is there: every file, every name that it mentions; and the walk of an edit goes down."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "architecture.md").read_text()
PACKAGES = ("runtime", "kernels", "export", "training")


def listed() -> dict[str, str]:
    """File -> its line, from the list of files."""
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (.+) \|$", TEXT, re.M)
    assert len(dict(rows)) == len(rows)
    return dict(rows)


def test_every_file_has_a_line_and_every_line_a_file() -> None:
    there = {str(p.relative_to(ROOT)) for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    there = {name for name in there if not name.endswith("__init__.py") or (ROOT / name).read_text().count("\n") > 3}
    assert sorted(listed()) == sorted(there)


def defined() -> dict[str, set[str]]:
    """Dotted module (below `runtime`, or from `kernels` on) -> what it defines at its top, and methods as `Class.method`."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            names: set[str] = set()
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                    names |= {f"{node.name}.{n.name}" for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
                elif isinstance(node, ast.Assign):
                    names |= {t.id for t in node.targets if isinstance(t, ast.Name)}
            parts = list(path.relative_to(ROOT).with_suffix("").parts)
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            found[".".join(parts[1:] if package == "runtime" else parts)] = names
    return found


def test_every_name_in_it_exists() -> None:
    modules = defined()
    everything = set().union(*modules.values())
    unknown, known = [], 0
    for code in re.findall(r"`([^`]+)`", TEXT):
        for word in re.split(r" -> |[()\s=]+", code):
            if "/" in word:
                there = (ROOT / word).exists()
            elif re.fullmatch(r"[A-Za-z_]\w*(\.\w+)+", word):
                owner, _, name = word.rpartition(".")
                module, _, cls = owner.rpartition(".")
                there = word in modules or word in everything or name in modules.get(owner, set())
                there = there or f"{cls}.{name}" in modules.get(module, set())
            elif re.fullmatch(r"[A-Z]\w*[a-z]\w*|[A-Z]{4,}", word):
                there = word in everything or word == "NAME"
            else:
                continue  # words, commands, options
            known += there
            unknown += [] if there else [word]
    assert unknown == [] and known > 50


def test_the_walk_of_an_edit_goes_down_and_never_back_up() -> None:
    """The modules of the walk, in its order: none imports one before it."""
    walk = (
        ["cli.edit", "editor", "pipeline", "sampling", "denoise_step"],
        ["editor", "pipeline", "network", "backends.base", "denoise_step"],
    )
    for modules in walk:
        for below in range(1, len(modules)):
            source = (ROOT / "runtime" / (modules[below].replace(".", "/") + ".py")).read_text()
            for above in modules[:below]:
                leaf = above.rpartition(".")[2]
                assert not re.search(
                    rf"^\s*from \.+(\w+\.)*{leaf} import|^\s*from \.+(\w+)? import .*\b{leaf}\b", source, re.M
                ), (
                    modules[below],
                    above,
                )
