"""How good the pairs of a corpus of renders are, against the scenes that were drawn: `python bench/pairs.py RENDERS PAIRS`.

Of every pseudo-target that was found, also those that were dropped for an empty mask: does its scene show the new word ("blue"), and does it
show it on what it describes ("blue car")? By what kind of word was replaced, with 95 % intervals (Wilson); and the same of the pairs that were kept.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

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


def main(renders: Path, folder: Path) -> None:
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
