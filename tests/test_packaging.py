"""The traps of mapping top-level folders to iedit.*: what only shows in a wheel, a subprocess or another folder."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

PACKAGES = ("runtime", "kernels", "export", "training")


def _run(code: str, cwd: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def wheel_names(root: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """What a wheel built from a copy of the tree holds; weights are replaced by empty files of their name."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tree / name)
    for package in PACKAGES:
        for path in (root / package).rglob("*"):
            copy = tree / path.relative_to(root)
            if path.is_dir() or "__pycache__" in path.parts:
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                copy.touch()
            else:
                shutil.copy(path, copy)
    # A deep data file of each kind, whether or not the embedded model is there yet.
    for suffix in ("json", "txt", "safetensors", "md", "png"):
        deep = tree / "runtime" / "picturebook" / "probe" / "deeper" / f"probe.{suffix}"
        deep.parent.mkdir(parents=True, exist_ok=True)
        deep.touch()
    built = _run("import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])", tree, str(out))
    assert built.returncode == 0, built.stderr
    (wheel,) = out.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_module_and_no_top_level_package(root: Path, wheel_names: set[str]) -> None:
    modules = {
        f"iedit/{path.relative_to(root).as_posix()}" for package in PACKAGES for path in (root / package).rglob("*.py")
    }
    assert len(modules) >= len(PACKAGES)
    assert modules <= wheel_names, sorted(modules - wheel_names)
    tops = {name.split("/")[0] for name in wheel_names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"iedit"}


def test_the_wheel_holds_the_package_data_at_any_depth(root: Path, wheel_names: set[str]) -> None:
    for suffix in ("json", "txt", "safetensors", "md", "png"):
        assert f"iedit/runtime/picturebook/probe/deeper/probe.{suffix}" in wheel_names
    for package in PACKAGES:
        assert f"iedit/{package}/py.typed" in wheel_names
    book = root / "runtime" / "picturebook"
    data = {f"iedit/{path.relative_to(root).as_posix()}" for path in book.rglob("*") if path.is_file()}
    data = {name for name in data if not name.endswith((".py", ".pyc"))}
    assert data <= wheel_names, sorted(data - wheel_names)


def test_the_wheel_holds_the_command(root: Path, wheel_names: set[str]) -> None:
    assert any(name.endswith(".dist-info/entry_points.txt") for name in wheel_names)
    scripts = tomllib.loads((root / "pyproject.toml").read_text())["project"]["scripts"]
    module, function = scripts["iedit"].split(":")
    assert f"{module.replace('.', '/')}.py" in wheel_names
    assert function == "main"


def test_help_imports_neither_torch_nor_anything_else_that_takes_seconds(root: Path) -> None:
    code = (
        "import sys\n"
        "from iedit.runtime.cli import main as cli\n"
        "try:\n    cli.main(['--help'])\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnxruntime', 'scipy', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)\n"
    )
    ran = _run(f"import sys; sys.path.insert(0, {str(root / '.types')!r})\n{code}", root)
    assert ran.returncode == 0, ran.stderr
    assert "Usage:" in ran.stdout


def test_layouts_and_images_do_without_torch(root: Path) -> None:
    code = "import iedit.runtime.layouts, iedit.training.world; sys.exit('torch' in sys.modules)"
    ran = _run(f"import sys; sys.path.insert(0, {str(root / '.types')!r})\n{code}", root)
    assert ran.returncode == 0, ran.stderr


def test_no_module_imports_the_folders_as_top_level_packages(root: Path) -> None:
    wrong = []
    for folder in (*PACKAGES, "tests", "bench"):
        for path in sorted((root / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names: list[str] = []
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names = [node.module or ""]
                wrong += [f"{path}: {name}" for name in names if name.split(".")[0] in PACKAGES]
    assert not wrong


def test_ruff_bans_what_works_from_the_repository_root_by_accident(root: Path) -> None:
    def verdict(code: str) -> int:
        command = ["ruff", "check", "--no-cache", "--select", "TID251", "--stdin-filename", "runtime/probe.py", "-"]
        return subprocess.run(
            [sys.executable, "-m", *command], input=code, cwd=root, capture_output=True, text=True
        ).returncode

    assert verdict("from kernels import dispatch\n") == 1
    assert verdict("from . import layouts\n") == 0


def test_every_folder_with_code_is_a_package_that_the_wheel_takes(root: Path) -> None:
    listed = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(root) for package in PACKAGES for path in (root / package).rglob("*.py")}
    assert {"iedit." + ".".join(folder.parts) for folder in folders} == set(listed)


def test_the_links_for_type_checkers_lead_to_the_folders(root: Path) -> None:
    for package in PACKAGES:
        link = root / ".types" / "iedit" / package
        assert link.is_symlink()
        assert link.resolve() == (root / package).resolve()


def test_constraints_pin_every_base_requirement_inside_its_range(root: Path) -> None:
    from packaging.requirements import Requirement

    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)$", (root / "constraints.txt").read_text(), flags=re.M))
    pins = {name.lower().replace("_", "-"): version for name, version in pins.items()}
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    for line in project["dependencies"]:
        requirement = Requirement(line)
        assert requirement.name in pins, f"{requirement.name} is not pinned"
        assert requirement.specifier.contains(pins[requirement.name]), f"{line} against {pins[requirement.name]}"


def test_what_an_error_says_to_install_is_in_that_extra_and_no_extra_has_both_onnxruntimes(root: Path) -> None:
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    packages = {extra: {re.split(r"[<>=; \[]", line)[0] for line in lines} for extra, lines in extras.items()}
    assert packages["gpu"] >= packages["onnx"] - {"onnxruntime"} | {"onnxruntime-gpu"}
    assert not any(names >= {"onnxruntime", "onnxruntime-gpu"} for names in packages.values())
    told = []
    for folder in ("runtime", "export", "training"):
        for path in sorted((root / folder).rglob("*.py")):
            for call in re.findall(r"missing\(((?:\s*\"[\w-]+\",)+)\s*extra=\"(\w+)\"", path.read_text()):
                told += [(name, call[1]) for name in re.findall(r"[\w-]+", call[0])]
    assert {"tensorrt", "xformers", "onnx", "onnxscript", "tensorboard", "bitsandbytes"} <= {name for name, _ in told}
    assert [t for t in told if t[0] not in packages[t[1]]] == []


def test_on_a_machine_with_a_gpu_nobody_is_told_to_put_onnxruntime_beside_onnxruntime_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from iedit.runtime.backends.base import missing

    assert missing("no_such_package", extra="onnx") == ['no_such_package is not installed (pip install "iedit[onnx]")']
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert missing("no_such_package", extra="onnx") == ['no_such_package is not installed (pip install "iedit[gpu]")']
