"""Which token stands for which: whole words swapped, common tokens kept in order, padding, long prompts, words re-weighted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from iedit.runtime.alignment import alignment
from iedit.runtime.codec import token_chunks
from iedit.runtime.errors import UsageError

CAR = "a red car on grass"


def tokens(model: Any, text: str, chunks: int = 1) -> list[str]:
    """What the text encoder is given, by name."""
    pieces = token_chunks(model, text)
    rows: list[str] = []
    for ids in [*pieces, *[[]] * (chunks - len(pieces))]:
        row = ["<begin>", *(model.tokenizer.decode([i]).strip() for i in ids), "<end>"]
        rows += row + ["<pad>"] * (model.text_length - len(row))
    return rows


def moved(model: Any, source: str, edit: str, cross: Tensor, chunks: int = 1) -> dict[int, list[str]]:
    """Position in the edit -> the source's tokens that it takes its map from."""
    names = tokens(model, source, chunks)
    return {j: [names[i] for i in cross[:, j].nonzero().flatten().tolist()] for j in range(cross.shape[1])}


def test_a_swap_takes_every_map_from_the_word_at_its_place(tiny: Any) -> None:
    edit = "a blue house on sand"
    cross, own = alignment(tiny, CAR, edit, 1)
    found = moved(tiny, CAR, edit, cross)
    assert [found[j] for j in range(7)] == [["<begin>"], ["a"], ["red"], ["car"], ["on"], ["grass"], ["<end>"]]
    assert found[7] == found[tiny.text_length - 1] == ["<pad>"]
    assert torch.equal(cross, torch.eye(tiny.text_length)) and not own.any()


def test_a_word_of_several_tokens_shares_the_map_of_the_one_that_it_replaces(tiny: Any) -> None:
    edit = "a red zyx on grass"  # a word in pieces
    pieces = tokens(tiny, edit)
    size = pieces.index("on") - pieces.index("red") - 1
    assert size > 1
    cross, own = alignment(tiny, CAR, edit, 1)
    assert torch.equal(cross[3, 3 : 3 + size], torch.full((size,), 1 / size)) and not own[: 6 + size].any()
    assert cross[4, 3 + size] == cross[5, 4 + size] == 1  # what follows is moved along
    back, _ = alignment(tiny, edit, CAR, 1)
    assert torch.equal(back[3 : 3 + size, 3], torch.ones(size))  # and the other way round all pieces go into one
    # A map's sum over the tokens is that of the source's: nothing is added or lost.
    assert torch.allclose(cross[: 6 + size - 1].sum(1)[:7], torch.ones(7))


def test_a_refinement_keeps_common_tokens_in_order_and_leaves_new_ones_their_own(tiny: Any) -> None:
    edit = "a red car and a tree on white grass"
    cross, own = alignment(tiny, CAR, edit, 1)
    names, found = tokens(tiny, edit), moved(tiny, CAR, edit, cross)
    new = [names[j] for j in own.nonzero().flatten().tolist()]
    assert new[:4] == ["and", "a", "tree", "white"]
    assert all(found[j] == [names[j]] for j in range(len(names)) if not own[j])
    assert torch.equal(own > 0, cross.sum(0) == 0)  # every token takes one map
    asked, kept = alignment(tiny, CAR, "a blue house on sand", 1, "refine")
    assert kept.nonzero().flatten().tolist() == [2, 3, 5] and asked[4, 4] == 1


def test_padding_keeps_its_own_map_where_the_source_has_a_word(tiny: Any) -> None:
    long = "a red car and a tree on white grass"
    cross, own = alignment(tiny, long, CAR, 1)
    n, m = tokens(tiny, long).index("<end>"), tokens(tiny, CAR).index("<end>")
    assert cross[n, m] == 1  # the end takes the end's
    assert own[m + 1 : n + 1].all() and not own[n + 1 :].any()


def test_the_same_prompt_twice_is_the_identity_whatever_is_asked(tiny: Any) -> None:
    for replacement in ("auto", "replace", "refine"):
        cross, own = alignment(tiny, CAR, CAR, 1, replacement)
        assert torch.equal(cross, torch.eye(tiny.text_length)) and not own.any()


def test_a_long_prompt_is_aligned_across_its_chunks(tiny: Any) -> None:
    words = ["red", "blue", "car", "tree", "sand", "grass"]
    source = " ".join(words[i % 6] for i in range(40))
    edit = " ".join("house" if i in (3, 35) else words[i % 6] for i in range(40))
    assert len(token_chunks(tiny, source)) == 2
    cross, own = alignment(tiny, source, edit, 2)
    assert torch.equal(cross, torch.eye(2 * tiny.text_length)) and not own.any()
    short, kept = alignment(tiny, CAR, source, 2)
    assert short.shape == (2 * tiny.text_length,) * 2 and torch.equal(kept > 0, short.sum(0) == 0)
    assert short[tiny.text_length, tiny.text_length] == 1  # the second chunk begins in both


def test_a_weight_multiplies_the_columns_of_its_word(tiny: Any) -> None:
    edit = "A red red car and a tree"
    cross, own = alignment(tiny, CAR, edit, 1)
    heavy, alone = alignment(tiny, CAR, edit, 1, reweight=[("Red", 3.0), ("tree", -1.0)])
    names = tokens(tiny, edit)
    for j, name in enumerate(names):
        factor = {"red": 3.0, "tree": -1.0}.get(name, 1.0)
        assert torch.equal(heavy[:, j], factor * cross[:, j]) and alone[j] == factor * own[j]
    assert names.count("red") == 2


def test_what_cannot_be_aligned_is_said(tiny: Any) -> None:
    with pytest.raises(
        UsageError, match="replacement is 'replace', but the source prompt has 5 words and the prompt 7"
    ):
        alignment(tiny, CAR, "a red car and a blue tree", 1, "replace")
    with pytest.raises(UsageError, match="the prompt has no word 'boat'; its words are a, red, car, on, grass"):
        alignment(tiny, "a boat", CAR, 1, reweight=[("boat", 2.0)])
