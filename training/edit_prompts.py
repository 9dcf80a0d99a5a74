"""Edit prompts from captions: one noun or adjective replaced by an antonym or a co-hyponym from WordNet (iEdit section 3.1).

Only words that name a visible thing, or a look of the thing that they stand before, are replaced: a noun whose most frequent sense is an
animal, an artifact, a plant, ...; an adjective of a visible attribute (hue, size, age, ...). A co-hyponym is a word of the same kind: for
adjectives another neighbour of the same opposite pair ("red" and "blue" are both chromatic), for nouns one whose nearest common kind is
narrow enough ("car" and "boat" are vehicles). Everything is decided by the caption and the seed.
"""

from __future__ import annotations

import functools
import random
import re
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass

from .wordnet import ADJECTIVE, NOUN, Key, Synset, WordNet

VISIBLE = frozenset(
    f"noun.{name}"
    for name in ("animal", "artifact", "body", "food", "object", "person", "phenomenon", "plant", "substance")
)
# The unique beginners of those (noun.Tops), which name visible things too.
_TOPS = frozenset(("animal", "food", "object", "person", "plant", "substance"))
LOOKS = frozenset((
    "hue", "value", "color", "size", "age", "fullness", "light", "length", "height", "width", "thickness", "depth", "shape", "texture",
    "wetness", "cleanness", "beauty", "straightness", "smoothness", "sex",
))  # fmt: skip
# Words that WordNet also has as nouns or adjectives ("a" is a vitamin) or that say nothing of what is seen.
_FUNCTION = frozenset(
    """
    a an the and or but of on in at to by for from with without into onto over under near next beside between behind above below
    is are was were be been being it its he she they his her their him them this that these those there here who which what as
    very more most some any each every all both no not one two three four five six seven eight nine ten other another
    photo photograph picture image view painting drawing background foreground front side top bottom middle center scene shot
    lot group pair couple bunch kind type part piece set
""".split()  # noqa: SIM905 (a word list is read as one)
)
_VOWEL_SOUND = re.compile(r"(?!uni|use|usu|ute|euro|one|once|ufo|ewe)[aeiou]|hour|honest|heir|honou?r")
# How many steps below the most general sense ("entity") the nearest common kind of two nouns must lie: vehicle is 7, animal 6,
# covering 5, artifact 4, object 2.
NARROW = 5
# Without a corpus' vocabulary: how often a word must have been tagged in WordNet's own corpora to be a common one.
COMMON = 3


@dataclass(frozen=True)
class EditPrompt:
    """One caption and what it is edited to.

    Attributes:
        caption, prompt: before and after; they differ in `word`, and in the article before it where that must change.
        word, replacement: as they stand there.
        relation: "antonym" or "co-hyponym".
        differences: what changed, before and after, with the noun that an adjective describes: the difference prompts of iEdit section 3.4.
    """

    caption: str
    prompt: str
    word: str
    replacement: str
    relation: str
    differences: tuple[str, str]


@dataclass(frozen=True)
class _Candidate:
    """A word of a caption that can be replaced: where it stands, as what, and the noun that it describes, if it is an adjective."""

    start: int
    end: int
    part: str
    lemma: str
    plural: bool
    noun: str


def vocabulary_of(captions: Iterable[str], at_least: int = 2) -> frozenset[str]:
    """Words that occur in a corpus `at_least` so often: what a replacement must be of, for a pseudo-target to exist."""
    counts = Counter(w.lower() for caption in captions for w in set(re.findall(r"[A-Za-z]+", caption)))
    return frozenset(w for w, count in counts.items() if count >= at_least)


def with_article(before: str, word: str) -> str:
    """`before` with the article at its end, if there is one, as `word` needs it: a or an."""
    match = re.search(r"\b(an?)(\s+)$", before, re.IGNORECASE)
    if match is None:
        return before
    article = "an" if _VOWEL_SOUND.match(word.lower()) else "a"
    article = article.capitalize() if match[1][0].isupper() else article
    return before[: match.start()] + article + match[2]


def plural_of(noun: str, irregular: dict[str, str]) -> str:
    """The plural of a singular noun; `irregular` is singular -> plural."""
    if noun in irregular:
        return irregular[noun]
    if re.search(r"(s|x|z|ch|sh)$", noun):
        return noun + "es"
    return noun[:-1] + "ies" if re.search(r"[^aeiou]y$", noun) else noun + "s"


class EditPrompts:
    """Makes edit prompts.

    Args:
        wordnet: the database.
        vocabulary: words that a replacement must be one of (`vocabulary_of` the corpus' captions); None allows every word that
            is common in WordNet's own corpora.
    """

    def __init__(self, wordnet: WordNet, vocabulary: Set[str] | None = None):
        self.wordnet, self.vocabulary = wordnet, vocabulary
        self._replacements = functools.cache(self._find_replacements)

    def make(self, caption: str, seed: int = 0) -> EditPrompt | None:
        """The edit prompt of a caption; None if nothing in it can be replaced. The same for the same caption and seed."""
        rng = random.Random(f"edit-prompt-{seed}-{caption}")
        words = f" {' '.join(re.findall(r'[a-z-]+', caption.lower()))} "
        choices = []
        for candidate in self.candidates(caption):
            found = {}
            for relation, some in self._replacements(candidate.lemma, candidate.part).items():
                # What the caption says already is nothing new: "a tree on grass" does not become "a grass on grass".
                unsaid = [w for w in some if f" {self._as_there(candidate, w)[1]} " not in words]
                if unsaid:
                    found[relation] = unsaid
            if found:
                choices.append((candidate, found))
        if not choices:
            return None
        candidate, replacements = rng.choice(choices)
        relation = rng.choice(sorted(replacements))
        new, difference = self._as_there(candidate, rng.choice(replacements[relation]))
        old = caption[candidate.start : candidate.end]
        if old[0].isupper():
            new = new[0].upper() + new[1:]
        prompt = with_article(caption[: candidate.start], new) + new + caption[candidate.end :]
        noun = f" {candidate.noun}" if candidate.noun else ""
        return EditPrompt(caption, prompt, old, new, relation, (f"{old.lower()}{noun}", difference))

    def _as_there(self, candidate: _Candidate, word: str) -> tuple[str, str]:
        """A replacement as it stands in the candidate's place, and with the noun that it describes."""
        word = plural_of(word, self._irregular) if candidate.plural else word
        return word, f"{word} {candidate.noun}" if candidate.noun else word

    def candidates(self, caption: str) -> list[_Candidate]:
        """The words of a caption that name a visible thing or a look of one, in order."""
        tokens = [(m.start(), m.end(), m.group().lower()) for m in re.finditer(r"[A-Za-z]+(?:-[A-Za-z]+)*", caption)]
        nouns = [None if word in _FUNCTION else self._visible_noun(word) for _, _, word in tokens]
        looks = [word not in _FUNCTION and self._is_look(word) for _, _, word in tokens]
        adjectives = [
            look or (word not in _FUNCTION and self._is_adjective(word))
            for look, (_, _, word) in zip(looks, tokens, strict=True)
        ]

        def head(i: int) -> int | None:
            """The noun that a word at i, if it is an adjective, stands before, with nothing but other adjectives between."""
            j = i + 1
            while j < len(tokens) and caption[tokens[j - 1][1] : tokens[j][0]].strip(" ,") == "":
                if nouns[j] is not None and not (looks[j] and head(j) is not None):
                    return j
                if not adjectives[j]:
                    return None
                j += 1
            return None

        found = []
        for i, (start, end, word) in enumerate(tokens):
            described = head(i) if looks[i] else None
            noun = nouns[i]
            if described is not None:
                found.append(_Candidate(start, end, ADJECTIVE, word, False, tokens[described][2]))
            elif noun is not None and not self._goes_on(caption, tokens, nouns, i):
                found.append(_Candidate(start, end, NOUN, noun, noun != word, ""))
        return found

    @staticmethod
    def _goes_on(caption: str, tokens: list[tuple[int, int, str]], nouns: list[str | None], i: int) -> bool:
        """Whether the noun at i is the first part of a compound: "fire" of "fire truck"."""
        return i + 1 < len(tokens) and nouns[i + 1] is not None and caption[tokens[i][1] : tokens[i + 1][0]] == " "

    @functools.cache  # noqa: B019 (one object a run)
    def _visible_noun(self, word: str) -> str | None:
        """The singular of a word that is a noun more often than a verb or an adjective, and a visible thing; None otherwise."""
        singular = self.wordnet.singular(word)
        if singular is None or self._sense(singular) is None:
            return None
        count = self.wordnet.count(singular, NOUN)
        return singular if count >= max(self.wordnet.count(word, p) for p in ("v", ADJECTIVE, "r")) else None

    def _sense(self, noun: str) -> Synset | None:
        """A noun's most frequent sense, if that is a visible thing."""
        senses = self.wordnet.senses(noun, NOUN)
        if not senses:
            return None
        visible = senses[0].lexname in VISIBLE or (senses[0].lexname == "noun.Tops" and noun in _TOPS)
        return senses[0] if visible else None

    def _is_adjective(self, word: str) -> bool:
        """Whether a word is an adjective more often than a noun."""
        return bool(self.wordnet.senses(word, ADJECTIVE)) and self.wordnet.count(word, ADJECTIVE) > self.wordnet.count(
            word, NOUN
        )

    def _is_look(self, word: str) -> bool:
        senses = self.wordnet.senses(word, ADJECTIVE)
        return bool(senses) and any(
            LOOKS & set(attribute.words)
            for sense in (senses[0], *self.wordnet.pointed(senses[0], "&"))
            for attribute in self.wordnet.pointed(sense, "=")
        )

    @functools.cached_property
    def _irregular(self) -> dict[str, str]:
        return self.wordnet.irregular_plurals()

    @functools.cached_property
    def _nouns(self) -> dict[str, list[list[Key]]]:
        """Every noun that can be a replacement -> the paths from its sense to the most general one."""
        words = self.wordnet.counted(NOUN, COMMON) if self.vocabulary is None else self.vocabulary
        allowed = {}
        for word in sorted(words):
            if word.isalpha() and word not in _FUNCTION and self._visible_noun(word) == word:
                sense = self._sense(word)
                assert sense is not None
                allowed[word] = self.wordnet.paths(sense)
        return allowed

    def _allowed(self, word: str, part: str) -> bool:
        """Whether a word may stand in a prompt as this part of speech ("stone" is a colour in WordNet, and never one in its corpora)."""
        if not word.isalpha() or not word.islower():
            return False
        least = COMMON if self.vocabulary is None else 1
        return self.wordnet.count(word, part) >= least and (self.vocabulary is None or word in self.vocabulary)

    def _find_replacements(self, lemma: str, part: str) -> dict[str, list[str]]:
        """Relation -> words that may take a word's place, sorted; relations without any are left out."""
        senses = self.wordnet.senses(lemma, part)
        synonyms = {w.lower() for sense in senses for w in sense.words}
        first = senses[0]
        opposite = {w for w in self.wordnet.antonyms(lemma, first) if self._allowed(w, part)} - synonyms
        similar: set[str] = set()
        if part == ADJECTIVE:
            for head in self.wordnet.pointed(first, "&"):
                for other in self.wordnet.pointed(head, "&"):
                    if other.key != first.key:
                        similar |= {
                            w
                            for w in other.words
                            if self._allowed(w, part) and self.wordnet.senses(w, part)[0].key == other.key
                        }
        else:
            similar = self._co_hyponyms(lemma, first)
        found = {"antonym": sorted(opposite), "co-hyponym": sorted(similar - synonyms - opposite)}
        return {relation: words for relation, words in found.items() if words}

    def _co_hyponyms(self, noun: str, sense: Synset) -> set[str]:
        """Nouns of the narrowest common kinds with `noun`, neither narrower nor wider than it itself."""
        own = self.wordnet.paths(sense)
        above = {key for path in own for key in path}
        depths: dict[str, int] = {}
        for word, paths in self._nouns.items():
            # A path runs from the sense to the most general one, so what follows the first common key is the depth of the common kind.
            common = [len(path) - 1 - i for path in paths for i, key in enumerate(path) if key in above]
            theirs = {key for path in paths for key in path}
            if word == noun or sense.key in theirs or paths[0][0] in above or not common:
                continue
            depths[word] = max(common)
        narrowest = max(depths.values(), default=0)
        return {word for word, depth in depths.items() if depth >= max(NARROW, narrowest - 1)}
