"""WordNet's database files (wndb(5WN)), as Debian's `wordnet-base` installs them to /usr/share/wordnet: nouns and adjectives.

Written for edit prompts: what a word's most frequent sense is, what it is a kind of, its opposites and its neighbours.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

NOUN, ADJECTIVE = "n", "a"
_FILES = {NOUN: "noun", ADJECTIVE: "adj"}
_NAMES = ("index.noun", "data.noun", "noun.exc", "index.adj", "data.adj", "cntlist.rev")
# Endings of plurals and what they stand for, by length (morphy(7WN)).
_ENDINGS = (
    ("ches", "ch"),
    ("shes", "sh"),
    ("ses", "s"),
    ("xes", "x"),
    ("zes", "z"),
    ("men", "man"),
    ("ies", "y"),
    ("s", ""),
)
# Lexicographer files, by their numbers (lexnames(5WN)).
LEXNAMES = (
    "adj.all", "adj.pert", "adv.all", "noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body",
    "noun.cognition", "noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive",
    "noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process", "noun.quantity", "noun.relation",
    "noun.shape", "noun.state", "noun.substance", "noun.time", "verb.body", "verb.change", "verb.cognition", "verb.communication",
    "verb.competition", "verb.consumption", "verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception",
    "verb.possession", "verb.social", "verb.stative", "verb.weather", "adj.ppl",
)  # fmt: skip

Key = tuple[str, int]  # part of speech and offset in its data file


@dataclass(frozen=True)
class Synset:
    """One sense.

    Attributes:
        key: its part of speech ("n" or "a") and place in the database.
        lexname: lexicographer file: "noun.artifact", "adj.all", ...
        words: its synonyms, as written, spaces as underscores.
        pointers: (symbol, key, word here, word there): "@" is a kind of, "!" the opposite of, "&" similar to, "=" an attribute; the
            words count from 1, and 0 means the whole sense.
    """

    key: Key
    lexname: str
    words: tuple[str, ...]
    pointers: tuple[tuple[str, Key, int, int], ...] = field(repr=False, default=())


class WordNet:
    """A WordNet 3.x database folder. Files are read when they are first needed; 2 s for all of them.

    Raises:
        FileNotFoundError: a file is missing; the message says how to get them.
        ValueError: a file is not of this format.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        for name in _NAMES:
            if not (folder / name).is_file():
                raise FileNotFoundError(
                    f"wordnet: {folder / name} is not there; name a folder of WordNet 3.0's database files "
                    "(apt-get install wordnet-base puts them into /usr/share/wordnet)"
                )

    def digest(self) -> str:
        """sha256 over the files: 64 hex digits."""
        return hashlib.sha256(
            b"".join(hashlib.sha256((self.folder / n).read_bytes()).digest() for n in _NAMES)
        ).hexdigest()

    def _lines(self, name: str) -> Iterator[str]:
        with (self.folder / name).open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if not line.startswith("  "):  # the licence
                    yield line

    @functools.cached_property
    def _index(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """Part of speech -> word -> offsets of its senses, the most frequent first."""
        index: dict[str, dict[str, tuple[int, ...]]] = {}
        for part, name in _FILES.items():
            index[part] = {}
            for line in self._lines(f"index.{name}"):
                fields = line.split()
                try:
                    count, pointers = int(fields[2]), int(fields[3])
                    index[part][fields[0]] = tuple(int(v) for v in fields[6 + pointers : 6 + pointers + count])
                except (IndexError, ValueError):
                    raise ValueError(f"wordnet: index.{name} holds a line of another format: {line[:60]!r}") from None
        return index

    @functools.cached_property
    def _data(self) -> dict[Key, str]:
        """The line of every sense; parsed when it is asked for."""
        return {(part, int(line[:8])): line for part, name in _FILES.items() for line in self._lines(f"data.{name}")}

    @functools.cached_property
    def _exceptions(self) -> dict[str, str]:
        """Irregular plural -> singular."""
        return {f[0]: f[1] for f in (line.split() for line in self._lines("noun.exc")) if len(f) >= 2}

    @functools.cached_property
    def _counts(self) -> dict[tuple[str, str], int]:
        """(word, part of speech) -> how often it was tagged in WordNet's corpora, all senses together."""
        counts: dict[tuple[str, str], int] = {}
        for line in self._lines("cntlist.rev"):
            sense, _, number = line.split()
            word, _, rest = sense.partition("%")
            part = {"1": NOUN, "2": "v", "3": ADJECTIVE, "5": ADJECTIVE, "4": "r"}[rest[0]]
            counts[word, part] = counts.get((word, part), 0) + int(number)
        return counts

    def synset(self, key: Key) -> Synset:
        """The sense at `key`."""
        fields = self._data[key].partition(" | ")[0].split()
        count = int(fields[3], 16)
        words = tuple(w.partition("(")[0] for w in fields[4 : 4 + 2 * count : 2])
        at = 5 + 2 * count
        pointers = []
        for i in range(int(fields[4 + 2 * count])):
            symbol, offset, part, ends = fields[at + 4 * i : at + 4 * i + 4]
            pointers.append(
                (symbol, (ADJECTIVE if part == "s" else part, int(offset)), int(ends[:2], 16), int(ends[2:], 16))
            )
        return Synset(key, LEXNAMES[int(fields[1])], words, tuple(pointers))

    def senses(self, word: str, part: str) -> list[Synset]:
        """The senses of a word as it stands in the database, the most frequent first; none if it is not there."""
        return [self.synset((part, offset)) for offset in self._index[part].get(word.lower(), ())]

    def count(self, word: str, part: str) -> int:
        """How often a word was tagged as this part of speech ("n", "a", "v" or "r") in WordNet's corpora."""
        return self._counts.get((word.lower(), part), 0)

    def counted(self, part: str, least: int) -> list[str]:
        """Words that were tagged at least so often as this part of speech."""
        return [word for (word, of), count in self._counts.items() if of == part and count >= least]

    def irregular_plurals(self) -> dict[str, str]:
        """Singular -> irregular plural."""
        return {singular: plural for plural, singular in self._exceptions.items()}

    def singular(self, word: str) -> str | None:
        """The noun that a word is or is the plural of; None if there is none."""
        word = word.lower()
        if word in self._exceptions and word not in self._index[NOUN]:
            return self._exceptions[word]
        if word in self._index[NOUN]:
            return word
        for ending, instead in _ENDINGS:
            if word.endswith(ending) and word[: len(word) - len(ending)] + instead in self._index[NOUN]:
                return word[: len(word) - len(ending)] + instead
        return None

    def pointed(self, synset: Synset, *symbols: str) -> list[Synset]:
        """The senses that `synset` points to by one of `symbols`."""
        return [self.synset(key) for symbol, key, _, _ in synset.pointers if symbol in symbols and key[0] in _FILES]

    def antonyms(self, word: str, synset: Synset) -> list[str]:
        """The opposites of `word` in this sense."""
        own = {i for i, w in enumerate(synset.words, 1) if w.lower() == word.lower()}
        return [self.synset(key).words[there - 1] for symbol, key, here, there in synset.pointers
                if symbol == "!" and here in own and there]  # fmt: skip

    def paths(self, synset: Synset) -> list[list[Key]]:
        """From `synset` up to the most general sense, by every way ("@"; an instance, "@i", is no kind of thing)."""
        above = [key for symbol, key, _, _ in synset.pointers if symbol == "@"]
        if not above:
            return [[synset.key]]
        return [[synset.key, *path] for key in above for path in self.paths(self.synset(key))]
