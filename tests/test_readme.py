"""What the README shows can be typed: its command lines parse, its options exist, its Python compiles."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import click
import pytest

from iedit.runtime import METHODS
from iedit.runtime.cli.main import main


def blocks(root: Path, language: str, page: str = "README.md") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (root / page).read_text(), re.DOTALL | re.MULTILINE)


def command_lines(root: Path, page: str) -> list[str]:
    text = "\n".join(blocks(root, "sh", page)).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.startswith("iedit ")]


def parse(line: str) -> click.Command:
    """The command of an `iedit ...` line; raises click's error if a name, an option or a value is wrong."""
    words = shlex.split(line, comments=True)
    command: click.Command = main
    while isinstance(command, click.Group):
        words = words[1:]
        if words[:1] == ["--help"]:
            return command
        with click.Context(command) as context:
            found = command.get_command(context, words[0]) if words else None
        if found is None:
            raise click.UsageError(f"no such command: {line}")
        command = found
    words = [w for w in words[1:] if w != "--help"]
    command.make_context(command.name, words)
    return command


def test_every_command_line_parses(root: Path) -> None:
    lines = command_lines(root, "README.md")
    assert len(lines) >= 8
    shown = {parse(line).name for line in lines}
    assert shown >= {"edit", "mask", "layouts", "replay", "info", "demo", "train", "profile", "onnx", "verify", "list"}


def test_every_command_line_of_the_training_page_parses_and_its_make_targets_exist(root: Path) -> None:
    assert {parse(line).name for line in command_lines(root, "docs/training.md")} >= {"pairs", "finetune", "edit"}
    shown = re.findall(r"^make ([a-z-]+)", "\n".join(blocks(root, "sh", "docs/training.md")), re.MULTILINE)
    makefile = (root / "Makefile").read_text()
    assert shown == ["train-demo"] and "\ntrain-demo:" in makefile
    recipe = (
        makefile.partition("\ntrain-demo:")[2]
        .partition("\n\n")[0]
        .replace("\\\n", " ")
        .replace("$(WORDNET)", "wordnet")
    )
    lines = [line.strip().removeprefix("$(BIN)/") for line in recipe.splitlines()[1:] if "$(BIN)/iedit" in line]
    assert [parse(line).name for line in lines] == ["renders", "pairs", "finetune"]


def test_every_command_line_of_the_evaluation_page_parses(root: Path) -> None:
    lines = command_lines(root, "docs/evaluate.md")
    assert {parse(line).name for line in lines} == {"truth", "pie", "imagenet", "pairs", "agreement"}
    text = (root / "docs" / "evaluate.md").read_text()
    group = main.get_command(click.Context(main), "evaluate")
    assert isinstance(group, click.Group)
    known = {o for c in group.commands.values() for p in c.params for o in p.opts}
    assert set(re.findall(r"--[a-z][a-z-]*", text)) <= known


def test_every_command_line_of_the_methods_page_parses_and_every_method_is_on_it(root: Path) -> None:
    lines = command_lines(root, "docs/methods.md")
    assert {parse(line).name for line in lines} == {"edit", "instruct", "adapter", "truth"} and len(lines) >= 7
    text = (root / "docs/methods.md").read_text()
    assert all(f"`{method}`" in text for method in METHODS)


@pytest.mark.parametrize("line", ["iedit edlt a.png", "iedit edit a.png --promt x", "iedit edit a.png", "iedit train"])
def test_a_wrong_line_would_be_noticed(line: str) -> None:
    with pytest.raises(click.UsageError):
        parse(line)


def test_every_make_target_shown_exists(root: Path) -> None:
    targets = re.findall(r"^([a-z]+):", (root / "Makefile").read_text(), re.MULTILINE)
    shown = re.findall(r"^make (\w+)", "\n".join(blocks(root, "sh")), re.MULTILINE)
    assert {"demo", "test"} <= set(shown) <= set(targets)


def test_every_fence_says_its_language_or_is_the_stage_graph(root: Path) -> None:
    fences = re.findall(r"^```(\w*)", (root / "README.md").read_text(), re.MULTILINE)
    assert set(fences[::2]) == {"sh", "python", ""}
    assert fences[::2].count("") == 1


def test_every_python_block_compiles_and_its_imports_exist(root: Path) -> None:
    found = blocks(root, "python")
    assert found
    for block in found:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(str(node.module))
                for name in node.names:
                    if not hasattr(module, name.name):  # then it is a module of the package, or this raises
                        importlib.import_module(f"{node.module}.{name.name}")
            elif isinstance(node, ast.Import):
                for name in node.names:
                    importlib.import_module(name.name)


def test_the_keywords_of_the_python_blocks_are_fields(root: Path) -> None:
    from iedit.runtime import editor

    checked = 0
    for block in blocks(root, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                fields = getattr(getattr(editor, node.func.id, None), "__dataclass_fields__", None)
                if fields is not None:
                    assert {k.arg for k in node.keywords} <= set(fields)
                    checked += 1
    assert checked >= 3


def test_the_options_table_has_every_option_of_edit_and_no_other(root: Path) -> None:
    text = (root / "README.md").read_text()
    rows = re.findall(r"^\| (`--.*?) \|", text, re.MULTILINE)
    shown = [name for row in rows for name in re.findall(r"`(--[a-z-]+)`", row)]
    known = {o for p in main.commands["edit"].params if isinstance(p, click.Option) for o in p.opts}
    assert sorted(shown) == sorted(known)


def test_the_methods_table_has_every_method(root: Path) -> None:
    rows = re.findall(r"^\| `([a-z][a-z0-9-]*)` \|", (root / "README.md").read_text(), re.MULTILINE)
    assert tuple(rows) == METHODS


def test_options_named_in_the_help_texts_exist() -> None:
    for name, command in main.commands.items():
        known = {o for p in command.params for o in p.opts} | {"--help"}
        everywhere = known | {o for c in main.commands.values() for p in c.params for o in p.opts}
        told = " ".join([command.help or "", *(getattr(p, "help", None) or "" for p in command.params)])
        assert set(re.findall(r"--[a-z][a-z-]*", told)) <= everywhere, name


def test_every_promise_names_a_test_that_exists(root: Path) -> None:
    text = (root / "README.md").read_text()
    section = text.split("\n## Promises\n")[1].split("\n## ")[0]
    rows = [row for row in section.splitlines() if row.startswith("| ") and not row.startswith("| Promise ")]
    assert len(rows) >= 30
    for row in rows:
        (place,) = re.findall(r"`(tests/test_\w+\.py)::(test_\w+)`", row)
        tree = ast.parse((root / place[0]).read_text())
        assert place[1] in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, row


def test_the_formats_that_the_readme_names_are_those_that_are_read(root: Path) -> None:
    from iedit.runtime.images import FORMATS

    (told,) = re.findall(r"Pictures are read from regular files in (.*?)\.\s", (root / "README.md").read_text())
    assert tuple(re.split(", | or ", told.replace("JPEG 2000", "JPEG2000").replace("WebP", "WEBP"))) == FORMATS
