"""Edit prompts: one word changed, to a real alternative, in a sentence that still reads."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from iedit.training import edit_prompts
from iedit.training.edit_prompts import EditPrompt, EditPrompts, plural_of, vocabulary_of, with_article
from iedit.training.wordnet import WordNet


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> WordNet:
    spec = importlib.util.spec_from_file_location("small_wordnet", Path(__file__).with_name("small_wordnet.py"))
    assert spec is not None and spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return WordNet(module.write(tmp_path_factory.mktemp("wordnet")))


def all_of(prompts: EditPrompts, caption: str, seeds: int = 40) -> dict[str, EditPrompt]:
    """Every edit that some seed makes of a caption, by its prompt."""
    made = [prompts.make(caption, seed) for seed in range(seeds)]
    return {p.prompt: p for p in made if p is not None}


def test_a_noun_becomes_another_of_its_kind_and_never_itself_a_synonym_or_a_kind_of_it(wordnet: WordNet) -> None:
    made = all_of(EditPrompts(wordnet), "a car near the house")
    # A cab is a car, an auto is the same, a dog is of too wide a kind; for the house there is nothing.
    assert set(made) == {"a boat near the house", "a bus near the house"}
    assert {p.relation for p in made.values()} == {"co-hyponym"}
    assert {p.differences for p in made.values()} == {("car", "boat"), ("car", "bus")}


def test_an_adjective_of_a_visible_attribute_becomes_its_opposite_or_its_neighbour(wordnet: WordNet) -> None:
    made = all_of(EditPrompts(wordnet, frozenset(("small", "little", "blue", "red", "famous"))), "a big red famous car")
    assert {(p.word, p.replacement, p.relation) for p in made.values()} == {
        ("big", "little", "antonym"),
        ("red", "blue", "co-hyponym"),
    }
    assert {p.differences for p in made.values()} == {("big car", "little car"), ("red car", "blue car")}


def test_only_one_word_changes_and_the_article_with_it(wordnet: WordNet) -> None:
    prompts = EditPrompts(wordnet)
    made = all_of(prompts, "A red dog and an orange car")
    assert "An orange dog and an orange car" in made and "A red dog and a blue car" in made
    for prompt, p in made.items():
        before, after = p.caption.split(), prompt.split()
        changed = [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b]
        words = [i for i in changed if before[i].lower() not in ("a", "an")]
        assert [before[i] for i in words] == [p.word] and [after[i] for i in words] == [p.replacement]
        assert all(i + 1 in words for i in changed if i not in words)


def test_plurals_stay_plural_and_capitals_stay(wordnet: WordNet) -> None:
    animals = EditPrompts(wordnet, frozenset(("dog", "wolf", "mouse", "woman")))
    assert set(all_of(animals, "Dogs")) == {"Wolves", "Mice", "Women"}
    assert set(all_of(animals, "three mice")) == {"three dogs", "three wolves", "three women"}
    assert plural_of("bus", {}) == "buses" and plural_of("city", {}) == "cities" and plural_of("toy", {}) == "toys"


def test_what_the_caption_says_already_is_nothing_new(wordnet: WordNet) -> None:
    made = set(all_of(EditPrompts(wordnet, frozenset(("car", "boat", "bus"))), "a car near a bus"))
    assert made == {"a boat near a bus", "a car near a boat"}
    vehicles = EditPrompts(wordnet, frozenset(("car", "bus")))
    assert vehicles.make("a car near a bus") is None and vehicles.make("cars near buses") is None
    colours = EditPrompts(wordnet, frozenset(("red", "blue")))
    assert colours.make("a red dog and a blue dog") is None
    # Another thing's colour is new for this one.
    assert set(all_of(colours, "a red dog and a blue mouse")) == {
        "a blue dog and a blue mouse",
        "a red dog and a red mouse",
    }


def test_what_names_nothing_that_can_be_seen_stays(wordnet: WordNet) -> None:
    prompts = EditPrompts(wordnet)
    # "a" is a vitamin there, "ride" a verb more often than a noun, "famous" no look, "orange" an adjective before a noun and else a fruit.
    for caption in ("a ride", "the famous", "", "¿qué?", "1234", "a"):
        assert prompts.make(caption) is None, caption
    assert [(c.lemma, c.part) for c in prompts.candidates("a famous orange car")] == [("orange", "a"), ("car", "n")]
    assert [c.lemma for c in prompts.candidates("a fire car")] == ["car"]  # a compound is changed at its head


def test_it_is_decided_by_the_caption_and_the_seed(wordnet: WordNet) -> None:
    captions = [
        f"a {a} {n} near a {b} {m}"
        for a in ("red", "blue")
        for b in ("big", "small")
        for n in ("car", "dog")
        for m in ("bus", "man")
    ]
    one, other = EditPrompts(wordnet), EditPrompts(wordnet)
    first = [one.make(c, 3) for c in captions]
    assert [other.make(c, 3) for c in reversed(captions)] == first[::-1]
    assert [one.make(c, 4) for c in captions] != first


def test_a_replacement_is_a_word_of_the_corpus_if_that_is_asked(wordnet: WordNet) -> None:
    words = vocabulary_of(["a car", "a boat", "Boat and car", "a bus"])
    assert words == {"a", "car", "boat"}
    assert set(all_of(EditPrompts(wordnet, words), "a car")) == {"a boat"}
    assert EditPrompts(wordnet, frozenset()).make("a car") is None


@pytest.mark.parametrize(
    ("before", "word", "after"),
    [
        ("an ", "car", "a "),
        ("A ", "orange", "An "),
        ("on a ", "hour", "on an "),
        ("an ", "unicorn", "a "),
        ("the ", "owl", "the "),
        ("", "owl", ""),
    ],
)
def test_articles(before: str, word: str, after: str) -> None:
    assert with_article(before, word) == after


def test_a_folder_that_is_no_wordnet_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"index.noun is not there; name a folder of WordNet.*wordnet-base"):
        WordNet(tmp_path)
    for name in ("index.noun", "data.noun", "noun.exc", "index.adj", "data.adj", "cntlist.rev"):
        (tmp_path / name).write_text("something else\n")
    with pytest.raises(ValueError, match=r"index.noun holds a line of another format: 'something else"):
        WordNet(tmp_path).senses("car", "n")


def test_every_function_word_is_one_word() -> None:
    assert all(re.fullmatch("[a-z]+", w) for w in edit_prompts._FUNCTION) and "photograph" in edit_prompts._FUNCTION
