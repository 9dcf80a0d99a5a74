"""How good the pairs of a corpus of renders are, against the scenes that were drawn: `python bench/pairs.py RENDERS PAIRS [WORDNET]`.

Of every pseudo-target that was found, also those that were dropped for an empty mask: does its scene show the new word ("blue"), and does it
show it on what it describes ("blue car")? By what kind of word was replaced, with 95 % intervals (Wilson); and the same of the pairs that were kept. With WordNet's folder
also what limits it: what an embedding that knew every word of a caption exactly would find in this corpus, and how well the embedded CLIP knows kinds.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from iedit.training import world
from iedit.training.demo_corpus import TRUTH
from iedit.training.metrics import wilson
from iedit.training.pairs import SKIPPED, read_pairs

KINDS = {
    "thing": world.KINDS,
    "colour": tuple(world.COLOURS),
    "ground": tuple(world.GROUNDS),
    "sky": tuple(world.SKIES),
}


def shows(scene: dict, difference: str) -> tuple[bool, bool]:
    """Whether the scene shows the difference prompt's first word, and all of its words together."""
    words = difference.split()
    things = [{t["colour"], t["kind"]} for t in scene["things"]]
    groups = [*things, {scene["ground"]}, {scene["sky"]}]
    return words[0] in set().union(*groups), any(set(words) <= g for g in groups)


def changed_exactly(row) -> bool:
    """Whether the two prompts differ in the intended word alone, and in the article before it if that must change."""
    before, after = row.source_caption.split(), row.edit_prompt.split()
    at = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
    words = [i for i in at if before[i] not in ("a", "an")]
    article = all(
        i + 1 in words and after[i] == ("an" if after[i + 1][0] in "aeiou" else "a") for i in at if i not in words
    )
    return [before[i] for i in words] == [row.word] and [after[i] for i in words] == [row.replacement] and article


def words_of(caption: str) -> set[str]:
    """What a caption says: things as colour, kind and both together, the ground, the sky."""
    things, _, rest = caption.partition(" on ")
    ground, _, sky = rest.partition(" at ")
    found = {f"on {ground}", f"at {sky}"}
    for thing in things.split(" and "):
        found |= {*thing.split()[1:], " ".join(thing.split()[1:])}
    return found


def nearest(images: np.ndarray, queries: np.ndarray, excluded: np.ndarray) -> np.ndarray:
    return np.where(excluded, -2.0, queries @ images.T).argmax(1)


def limits(renders: Path, truth: dict, wordnet: Path, duplicate: float, seed: int) -> None:
    """Print what the corpus and the rule allow, and what the embedded CLIP knows."""
    from iedit.training import pair_models
    from iedit.training.corpus import Sample, open_corpus
    from iedit.training.edit_prompts import EditPrompts, vocabulary_of
    from iedit.training.wordnet import WordNet

    samples = [s for shard in open_corpus(renders) for s in shard if isinstance(s, Sample)]
    maker = EditPrompts(WordNet(wordnet), vocabulary_of(s.caption for s in samples))
    edits = [maker.make(s.caption, seed) for s in samples]
    said = [words_of(s.caption) for s in samples]
    asked = [words_of(e.prompt) if e else said[i] for i, e in enumerate(edits)]
    names = sorted(set().union(*said, *asked))

    def exact(sets: list[set[str]]) -> np.ndarray:
        values = np.array([[name in some for name in names] for some in sets], float)
        return values / np.linalg.norm(values, axis=1, keepdims=True)

    images = exact(said)
    found = nearest(images, images + exact(asked), images @ images.T >= duplicate)
    for count in (None, 1, 2):
        scores = [shows(truth[samples[found[i]].key], e.differences[1]) for i, e in enumerate(edits)
                  if e and count in (None, len(truth[samples[i].key]["things"]))]  # fmt: skip
        loose, strict = np.mean(scores, 0)
        print(
            f"exact embeddings, sources of {count or 'any number of'} thing(s): the new word {loose:.1%}  on what it describes {strict:.1%}"
        )
    clip = pair_models.load("picturebook", "clip", "cpu")
    single = [s for s in samples if len(truth[s.key]["things"]) == 1]
    parts = [np.concatenate([f(one[i : i + 32]) for i in range(0, len(one), 32)])
             for f, one in ((clip.images, [s.image for s in samples]), (clip.texts, [s.caption for s in single]))]  # fmt: skip
    best = nearest(parts[0], parts[1], np.zeros((len(single), len(samples)), bool))
    right = np.mean([{t["kind"] for t in truth[samples[j].key]["things"]} == {t["kind"] for t in truth[s.key]["things"]}
                     for j, s in zip(best, single, strict=True)])  # fmt: skip
    print(f"embedded CLIP: the render nearest to a caption of one thing is of its kind in {right:.1%} of {len(single)}")


def main(renders: Path, folder: Path, wordnet: Path | None = None) -> None:
    truth = json.loads((renders / TRUTH).read_text())
    data = read_pairs(folder)
    rows = [data.row(i) for i in range(len(data))]
    found = [(r.target_key, r.source_key, r.target_difference, True) for r in rows]
    with (folder / SKIPPED).open(newline="") as file:
        for line in csv.DictReader(file):
            match = re.fullmatch(r"the pseudo-target's mask .*\((\S+), “(.+)”\)", line["reason"])
            if match:
                found.append((match[1], line["key"], match[2], False))
    scores = defaultdict(list)
    for target, source, difference, kept in found:
        kind = next(k for k, words in KINDS.items() if difference.split()[0] in words)
        score = shows(truth[target], difference)
        things = f"source of {len(truth[source]['things'])} thing(s)"
        for name in (kind, things, "all", *(["kept"] if kept else [])):
            scores[name].append(score)
    print(f"{len(truth)} renders, {len(found)} pseudo-targets, {len(rows)} pairs kept")
    print(f"prompts that differ in exactly the intended word: {sum(map(changed_exactly, rows))} of {len(rows)}")
    for name in (*KINDS, "source of 1 thing(s)", "source of 2 thing(s)", "all", "kept"):
        if scores[name]:
            n = len(scores[name])
            parts = []
            for what, index in (("the new word", 0), ("on what it describes", 1)):
                hits = sum(s[index] for s in scores[name])
                low, high = wilson(hits, n)
                parts.append(f"{what} {hits / n:.1%} ({low:.1%}-{high:.1%})")
            print(f"{name:22} n={n:5}  " + "  ".join(parts))
    if wordnet is not None:
        limits(renders, truth, wordnet, data.manifest.settings["duplicate"], data.manifest.settings["seed"])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
