"""One weights file for graphs that have weights in common."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from iedit.export.shared_weights import share_weights

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"


def write(folder: Path, weights: dict[str, Any]) -> Path:
    """A graph that returns the sum of its weights and of `x`, with all of them in a file."""
    folder.mkdir()
    helper, total, nodes = onnx.helper, "x", []
    for name in weights:
        nodes.append(helper.make_node("Add", [total, name], [f"{total}+{name}"]))
        total += f"+{name}"
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [64, 64]) for n in ("x", total)]
    held = [onnx.numpy_helper.from_array(v, n) for n, v in weights.items()]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", value[:1], value[1:], held),
        ir_version=10,
        opset_imports=[helper.make_opsetid("", 22)],
    )
    onnx.save(proto, str(folder / GRAPH), save_as_external_data=True, location=WEIGHTS, size_threshold=0)
    return folder


def total(folder: Path) -> Any:
    session = ort.InferenceSession(str(folder / GRAPH))
    return session.run(None, {"x": np.zeros((64, 64), np.float32)})[0]


@pytest.fixture
def w() -> list[Any]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((64, 64), dtype=np.float32) for _ in range(4)]


def test_what_graphs_have_in_common_is_on_the_disk_once_whatever_it_is_called(tmp_path: Path, w: list[Any]) -> None:
    unet = write(tmp_path / "unet", {"a": w[0], "b": w[1]})
    pose = write(tmp_path / "unet+pose", {"unet.b": w[1], "pose.c": w[2], "unet.a": w[0]})
    want = total(pose)
    assert share_weights(pose, GRAPH, WEIGHTS, [unet]) == 2 * 64 * 64 * 4
    assert (pose / "unet.onnx.data").samefile(unet / WEIGHTS)
    assert (pose / WEIGHTS).stat().st_size == 64 * 64 * 4
    assert np.array_equal(total(pose), want)
    both = write(tmp_path / "unet+pose+scribble", {"a": w[0], "b": w[1], "c": w[2]})
    want = total(both)
    assert share_weights(both, GRAPH, WEIGHTS, [unet, pose]) == 3 * 64 * 64 * 4
    assert sorted(p.name for p in both.iterdir()) == [GRAPH, "unet+pose.onnx.data", "unet.onnx.data"]
    assert np.array_equal(total(both), want)
    # Neither a copy nor what becomes of the engine that it was shared with changes anything.
    shutil.copytree(both, tmp_path / "copy")
    shutil.rmtree(unet)
    shutil.rmtree(pose)
    assert np.array_equal(total(both), want) and np.array_equal(total(tmp_path / "copy"), want)


def test_other_weights_by_the_same_name_are_not_shared(tmp_path: Path, w: list[Any]) -> None:
    unet, pose = write(tmp_path / "unet", {"a": w[0]}), write(tmp_path / "unet+pose", {"a": w[1]})
    files = {p.name: p.read_bytes() for p in pose.iterdir()}
    assert share_weights(pose, GRAPH, WEIGHTS, [unet, tmp_path / "not there"]) == 0
    assert {p.name: p.read_bytes() for p in pose.iterdir()} == files


def test_where_no_link_can_be_made_each_graph_keeps_its_own(
    tmp_path: Path, w: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    unet, pose = write(tmp_path / "unet", {"a": w[0]}), write(tmp_path / "unet+pose", {"a": w[0], "b": w[1]})
    files = {p.name: p.read_bytes() for p in pose.iterdir()}

    def elsewhere(*_: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", elsewhere)
    assert share_weights(pose, GRAPH, WEIGHTS, [unet]) == 0
    assert {p.name: p.read_bytes() for p in pose.iterdir()} == files


def test_an_exported_graph_with_controlnets_reads_the_weights_of_those_with_less(tiny_engines: Path) -> None:
    folder = tiny_engines / "onnx-fp32"
    for fused in ("unet+pose", "unet+pose+scribble"):
        assert (folder / fused / "unet.onnx.data").samefile(folder / "unet" / WEIGHTS)
    both = folder / "unet+pose+scribble"
    assert (both / "unet+pose.onnx.data").samefile(folder / "unet+pose" / WEIGHTS)
    sizes = [(folder / one / WEIGHTS).stat().st_size for one in ("unet", "unet+pose")]
    assert (both / WEIGHTS).stat().st_size < 1.2 * min(sizes)  # the scribble's ControlNet alone
