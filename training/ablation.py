"""The paper's ablation (iEdit Table 2) in small, on the picture-book world: `iedit train ablation`.

Renders with captions become pairs, the model is fine-tuned once for each row of losses, and the truth suite scores held-out edits. Every
step is kept in the work folder, and the same command goes on from there. Small stand-ins take the place of the large networks: for BLIP's
captions the exact ones, for CLIPSeg's masks the exact ones, for VGG-16 a narrow network of its form with fixed random weights, for CLIP
the embedded model's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..runtime.errors import UsageError
from ..runtime.files import write_whole
from . import demo_corpus, losses, truth, world
from .finetune import Settings, finetune

PICTURES = 3000
CANDIDATES = 16  # neighbours that are tried for the new word: in a small corpus the nearest often does not show it
VGG_WIDTHS = (16, 16, 0, 32, 32, 0, 64, 64, 64)
# Edits whose words stand in WordNet beside each other: a corpus of renders has next to no pairs that ask for another ground or sky.
KINDS = ("thing", "colour")
# Share of the steps that the picture is noised by -> one of how many edits is made with it. 4 steps of 25 are so little noise that the
# embedded model does what it is told in 78 % of the edits; at the paper's 0.7 it does in 98 %, which leaves nothing to gain.
RATIOS = {0.16: 1, 0.7: 4}
NAMES = {"new": "as new", "rest": "rest kept", "l1_in": "L1 inside", "l1_out": "L1 outside"}


@dataclass(frozen=True)
class Row:
    """A row of the table: what is trained with, on which captions, and how is edited. No losses is the base model."""

    name: str
    losses: tuple[str, ...]
    captions: str
    method: str

    @property
    def model(self) -> str:
        """Name of the fine-tuned model; rows that differ only in how is edited share one."""
        return "-".join((self.captions, *self.losses))


_FULL = ("mask", "global", "local", "perceptual")
ROWS = (
    Row("base model", (), "", "sdedit"),
    Row("global + paired, raw captions", ("paired", "global"), "raw", "sdedit"),
    Row("global + paired, edit prompts", ("paired", "global"), "exact", "sdedit"),
    Row("+ local", ("paired", "global", "local"), "exact", "sdedit"),
    Row("+ perceptual", ("paired", "global", "local", "perceptual"), "exact", "sdedit"),
    Row("mask in place of paired", _FULL, "exact", "sdedit"),
    Row("+ masked inference", _FULL, "exact", "iedit"),
    Row("base model, masked inference", (), "", "iedit"),
)


def raw_caption(scene: world.Scene) -> str:
    """A caption as the web has them: a third is of another picture, and of the others some leave things out; words of trade stand around them."""
    rng = random.Random(f"raw-{world.caption(scene)}")
    if rng.random() < 1 / 3:
        scene = world.random_scene(rng)
    words = world.caption(scene)
    if rng.random() < 0.5:
        words = words.rpartition(" on ")[0]
    if rng.random() < 0.5:
        words = words.rpartition(" and ")[2]
    return f"{rng.choice(('', 'stock photo of ', 'free download ', 'image 2031: '))}{words}{rng.choice(('', ' for sale', ', print'))}"


def write_vgg(path: Path) -> None:
    """The stand-in for VGG-16: narrow, with weights drawn once (He initialisation, seed 0)."""
    from safetensors.torch import save

    rng = torch.Generator().manual_seed(0)
    features = losses.VggFeatures(widths=VGG_WIDTHS).features
    for layer in features:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=rng)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    write_whole(path, save(features.state_dict(prefix="features.")))


def run(
    work: Path,
    model: str,
    editor_of: Callable[[str], Any],
    reader: truth.Reader,
    settings: Settings,
    *,
    wordnet: Path,
    pictures: int = PICTURES,
    count: int = 60,
    seed: int = 0,
    steps: int = 25,
    rows: Sequence[Row] = ROWS,
    tell: Callable[[Any], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> list[dict[str, Any]]:
    """Make the pairs, fine-tune the models and measure every row.

    Args:
        work: everything is kept there.
        model: what is fine-tuned.
        editor_of: loads an editor for a model.
        settings: of the fine-tuning but for the losses.
        wordnet: folder of WordNet's database.
        pictures: renders in the corpus.
        count: held-out edits of each of `KINDS`.
        steps: of sampling.

    Returns:
        A dict for each row and each of `RATIOS`: `name`, `method`, `ratio`, `n`, and of all edits together each of `NAMES` with
        its interval.

    Raises:
        UsageError, RunError: as what it calls does.
    """
    from . import build_pairs

    vgg = work / "vgg.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    write_vgg(vgg)
    for captions in {r.captions: None for r in rows if r.captions}:
        corpus, folder = work / f"renders-{captions}", work / f"pairs-{captions}"
        if not (corpus / demo_corpus.TRUTH).is_file():
            say(f"drawing {pictures} renders with {captions} captions")
            caption = raw_caption if captions == "raw" else world.caption
            demo_corpus.write_renders(corpus, pictures, caption=caption)
        say(f"building pairs of {corpus}")
        chosen = build_pairs.Settings(
            corpus=str(corpus), out=str(folder), clip="picturebook", masks="own", size=world.SIZE, wordnet=str(wordnet),
            candidates=CANDIDATES, device="cpu",
        )  # fmt: skip
        say(f"{build_pairs.build(chosen).pairs} pairs")
    done = []
    for row in rows:
        tuned = model
        if row.losses:
            say(f"fine-tuning: {row.name}")
            own = Settings(**{**settings.__dict__, "losses": row.losses})
            tuned = str(finetune(work / row.model, model, work / f"pairs-{row.captions}", own, clip="picturebook", vgg=vgg,
                                 tell=tell, say=say))  # fmt: skip
        editor = editor_of(tuned)
        for ratio, share in RATIOS.items():
            say(f"measuring: {row.name} at ratio {ratio:g}")
            method = truth.Method(f"{row.method} {ratio:g}", row.method, KINDS, {"ratio": ratio})
            scored = truth.run(
                editor, reader, [method], KINDS, max(1, count // share), settings=f"{editor.model.digest}", seed=seed, steps=steps,
                output=work / "truth" / (row.model if row.losses else "base") / f"{row.method}-{ratio:g}", log=say,
            )  # fmt: skip
            (summary,) = [s for s in truth.summarise(scored) if s["kind"] == "text"]
            done.append({**summary, "name": row.name, "method": row.method, "ratio": ratio})
    return done


def table(done: Sequence[Mapping[str, Any]]) -> str:
    """The rows as markdown, each figure with its 95 % interval."""

    def figure(one: Mapping[str, Any], name: str) -> str:
        share = name in truth.SHARES
        low, value, high = (one[name + suffix] * (100 if share else 1) for suffix in ("_low", "", "_high"))
        return f"{value:.0f} % ({low:.0f}-{high:.0f})" if share else f"{value:.4f} ({low:.4f}-{high:.4f})"

    head = ["trained with", "inference", "ratio", "edits", *NAMES.values()]
    lines = [head, ["---"] * len(head)]
    for one in done:
        words = [str(one[name]) for name in ("name", "method")]
        lines.append([*words, f"{one['ratio']:g}", str(one["n"]), *(figure(one, n) for n in NAMES)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_BEGIN, _END = "<!-- ablation -->", "<!-- /ablation -->"


def replace_table(document: Path, done: Sequence[Mapping[str, Any]]) -> str:
    """The text of a document with `table` of the rows between its two marks.

    Raises:
        UsageError: it is not there, or has no such marks.
    """
    text = document.read_text(encoding="utf-8") if document.is_file() else ""
    before, begun, rest = text.partition(_BEGIN)
    _, ended, after = rest.partition(_END)
    if not (begun and ended):
        raise UsageError(f"write: {document} has no place for the table; put {_BEGIN} and {_END} where it goes")
    return f"{before}{_BEGIN}\n{table(done)}\n{_END}{after}"
