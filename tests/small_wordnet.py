"""A WordNet database of a few dozen words, in the very format of the real one (wndb(5WN)), for tests."""

from __future__ import annotations

from pathlib import Path

from iedit.training.wordnet import LEXNAMES

# name -> (lexicographer file, words, kinds of), most general first.
NOUNS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "entity": ("Tops", ("entity",), ()),
    "physical": ("Tops", ("physical_entity",), ("entity",)),
    "object": ("Tops", ("object",), ("physical",)),
    "whole": ("object", ("whole",), ("object",)),
    "artifact": ("artifact", ("artifact",), ("whole",)),
    "instrument": ("artifact", ("instrumentality",), ("artifact",)),
    "conveyance": ("artifact", ("conveyance",), ("instrument",)),
    "vehicle": ("artifact", ("vehicle",), ("conveyance",)),
    "car": ("artifact", ("car", "auto"), ("vehicle",)),
    "cab": ("artifact", ("cab",), ("car",)),
    "boat": ("artifact", ("boat",), ("vehicle",)),
    "bus": ("artifact", ("bus",), ("vehicle",)),
    "fire": ("phenomenon", ("fire",), ("physical",)),
    "structure": ("artifact", ("structure",), ("artifact",)),
    "house": ("artifact", ("house",), ("structure",)),
    "living": ("Tops", ("living_thing",), ("whole",)),
    "organism": ("Tops", ("organism",), ("living",)),
    "animal": ("Tops", ("animal",), ("organism",)),
    "dog": ("animal", ("dog",), ("animal",)),
    "wolf": ("animal", ("wolf",), ("animal",)),
    "mouse": ("animal", ("mouse",), ("animal",)),
    "person": ("Tops", ("person",), ("organism",)),
    "man": ("person", ("man",), ("person",)),
    "woman": ("person", ("woman",), ("person",)),
    "ride": ("act", ("ride",), ("entity",)),
    "vitamin": ("substance", ("vitamin_A", "a"), ("physical",)),
    "fruit": ("food", ("orange",), ("physical",)),
    "hue": ("attribute", ("hue",), ("entity",)),
    "size": ("attribute", ("size",), ("entity",)),
    "fame": ("state", ("fame",), ("entity",)),
}
# name -> (words, similar to, attributes, {word: (name, word) of its opposite})
ADJECTIVES: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...], dict[str, tuple[str, str]]]] = {
    "chromatic": (("chromatic",), ("red", "blue", "orange"), ("hue",), {}),
    "red": (("red", "scarlet"), ("chromatic",), (), {}),
    "blue": (("blue",), ("chromatic",), (), {}),
    "orange": (("orange",), ("chromatic",), (), {}),
    "big": (("large", "big"), (), ("size",), {"large": ("small", "small"), "big": ("small", "little")}),
    "small": (("small", "little"), (), ("size",), {"small": ("big", "large"), "little": ("big", "big")}),
    "famous": (("famous",), (), ("fame",), {}),
}
COUNTS = {("ride", "v"): 9, ("ride", "n"): 1, ("fire", "n"): 5} | {
    (w, "n"): 5 for w in ("car", "boat", "bus", "house", "dog", "wolf", "mouse", "man", "woman", "person", "orange", "auto", "cab", "a")
} | {(w, "a"): 6 for w in ("red", "blue", "orange", "large", "big", "small", "little", "famous")}  # fmt: skip


def write(folder: Path) -> Path:
    """The database in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    licence = "  1 This stands for the licence, which the real files begin with.\n"
    offsets: dict[str, int] = {}
    texts: dict[str, str] = {}
    for _ in range(2):  # offsets are known after the first time, and lines do not change their length
        for part in ("noun", "adj"):
            lines, at = [licence], len(licence)
            for name, line in ((n, _line(n, part, offsets)) for n in (NOUNS if part == "noun" else ADJECTIVES)):
                offsets[f"{part} {name}"] = at
                lines.append(line)
                at += len(line)
            texts[part] = "".join(lines)
    for part, text in texts.items():
        (folder / f"data.{part}").write_text(text)
        index: dict[str, list[int]] = {}
        for name, entry in (NOUNS if part == "noun" else ADJECTIVES).items():
            for word in entry[1] if part == "noun" else entry[0]:
                index.setdefault(str(word).lower(), []).append(offsets[f"{part} {name}"])
        rows = [
            f"{word} {part[0]} {len(found)} 1 @ {len(found)} 0 {' '.join(f'{o:08d}' for o in found)}  \n"
            for word, found in sorted(index.items())
        ]
        (folder / f"index.{part}").write_text(licence + "".join(rows))
    (folder / "noun.exc").write_text("men man\nmice mouse\nwolves wolf\nwomen woman\n")
    numbers = {"n": "1", "v": "2", "a": "3"}
    (folder / "cntlist.rev").write_text("".join(f"{w}%{numbers[p]}:00:00:: 1 {c}\n" for (w, p), c in COUNTS.items()))
    return folder


def _line(name: str, part: str, offsets: dict[str, int]) -> str:
    def at(key: str) -> str:
        return f"{offsets.get(key, 0):08d}"

    if part == "noun":
        lexname, words, above = NOUNS[name]
        number = LEXNAMES.index(f"noun.{lexname}")
        pointers = [f"@ {at(f'noun {n}')} n 0000" for n in above]
    else:
        words, similar, attributes, opposites = ADJECTIVES[name]
        number = LEXNAMES.index("adj.all")
        pointers = [f"& {at(f'adj {n}')} s 0000" for n in similar] + [f"= {at(f'noun {n}')} n 0000" for n in attributes]
        for word, (other, opposite) in opposites.items():
            here, there = words.index(word) + 1, ADJECTIVES[other][0].index(opposite) + 1
            pointers.append(f"! {at(f'adj {other}')} a {here:02x}{there:02x}")
    listed = " ".join(f"{w} 0" for w in words)
    return f"{at(f'{part} {name}')} {number:02d} {part[0]} {len(words):02x} {listed} {len(pointers):03d} {' '.join(pointers)} | a gloss  \n"
