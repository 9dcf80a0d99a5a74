"""One weights file for all graphs that have the weights: the UNet's, and each ControlNet's where several are fused.

A fused graph reads the UNet's weights from a hard link of the plain UNet's file, which takes no room on the disk and is in the page cache once,
and keeps those of its ControlNet in a file of its own; a graph with several ControlNets reads theirs from links too. Weights are recognised by their bytes, so no graph ever reads other values than it was
exported with. A copy of an engine's folder is whole: copying makes the link a file. ONNX Runtime reads such a file like any other, TensorRT's parser has not been tried;
`onnx.checker` and `onnx.load` refuse external data with more than one link (onnx#7686), as they do not know who made it.
"""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

_ALIGNMENT = 4096  # of a memory page, so that a weight can be mapped


def _external(proto: Any) -> Iterator[tuple[Any, str, int, int]]:
    """The weights of a graph that lie in files: tensor, file name, offset, length."""
    for tensor in proto.graph.initializer:
        entry = {e.key: e.value for e in tensor.external_data}
        if entry:
            yield tensor, entry["location"], int(entry.get("offset", 0)), int(entry["length"])


def _place(tensor: Any, location: str, offset: int, length: int) -> None:
    """Say where a tensor's bytes are."""
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)


def share_weights(folder: Path, graph: str, weights: str, others: Iterable[Path]) -> int:
    """Have the graph in `folder` read from links of other engines' weights what those hold; the rest stays in its own file.

    Args:
        graph, weights: names of the two files in every folder.
        others: folders of engines whose own weights are shared, those that hold most first. They may be missing, or be replaced by another
            process meanwhile: what counts is the bytes in the file that was linked.

    Returns:
        Bytes that `folder` holds no copy of; 0 where nothing was changed, because none of the others holds an equal weight, or they lie
        where no link leads.
    """
    return sum(_share(folder, graph, weights, other, f"{other.name}.onnx.data") for other in others)


def _share(folder: Path, graph: str, weights: str, other: Path, link: str) -> int:
    """`share_weights` with one other engine, whose weights are called `link` in `folder`."""
    import onnx

    proto = onnx.load(str(folder / graph), load_external_data=False)
    mine = [entry for entry in _external(proto) if entry[1] == weights]
    if not mine:
        return 0
    try:
        os.link(other / weights, folder / link)
        theirs = onnx.load(str(other / graph), load_external_data=False)
    except OSError:
        (folder / link).unlink(missing_ok=True)
        return 0
    own, saved = folder / f"{weights}.own", 0
    with _mapped(folder / link) as shared, _mapped(folder / weights) as before, own.open("wb") as rest:
        places = {
            hashlib.sha256(shared[offset : offset + length]).digest(): (offset, length)
            for _, location, offset, length in _external(theirs)
            if location == weights
        }
        for tensor, _, offset, length in mine:
            value = before[offset : offset + length]
            place = places.get(hashlib.sha256(value).digest())
            if place is not None:
                _place(tensor, link, *place)
                saved += length
                continue
            rest.write(bytes(-rest.tell() % _ALIGNMENT))
            _place(tensor, weights, rest.tell(), length)
            rest.write(value)
    if not saved:
        own.unlink()
        (folder / link).unlink()
        return 0
    if own.stat().st_size:
        os.replace(own, folder / weights)
    else:
        own.unlink()
        (folder / weights).unlink()
    onnx.save(proto, str(folder / graph))
    return saved


def _mapped(path: Path) -> mmap.mmap:
    """A file's bytes, read where they are looked at."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
