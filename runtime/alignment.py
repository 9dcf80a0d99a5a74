"""Which token of one prompt stands for which of another: what Prompt-to-prompt (Hertz et al. 2022, arXiv:2208.01626) moves attention by."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codec import token_chunks
from .errors import UsageError
from .model.model import Model


def alignment(
    model: Model,
    source: str,
    edit: str,
    chunks: int,
    replacement: str = "auto",
    reweight: Sequence[tuple[str, float]] = (),
) -> tuple[Tensor, Tensor]:
    """`cross` and `own` of `denoise_step.AttentionControl` for a pair of prompts.

    "replace" takes every map of the edit from the source: word for word, a word of another number of tokens evenly (word swap). "refine"
    takes the maps of the tokens that both prompts have, in the longest common order, and leaves its own to a token that is new (adding a
    phrase). "auto" is "replace" for prompts of equally many words, else "refine". Begin and end take the source's, and padding that of the
    same position, or its own where the source has a word there.

    Args:
        chunks: pieces of the tokenizer's length that both are encoded in (`codec.Codec.encode_text`).
        reweight: (word, factor) pairs: the map of each such word of the edit is multiplied.

    Returns:
        (L, L), from the source's tokens (rows) to the edit's, and (L,); float32, L = chunks * `Model.text_length`.

    Raises:
        UsageError: "replace" was asked for and the numbers of words differ, or a word is not in the edit's prompt.
    """
    length = model.text_length
    rows = [_positions(model, text) for text in (source, edit)]
    words = [_word_spans(model, text) for text in (source, edit)]
    swap = len(words[0]) == len(words[1])
    if replacement == "replace" and not swap:
        raise UsageError(
            f"replacement is 'replace', but the source prompt has {len(words[0])} words and the prompt {len(words[1])}; "
            "say both in equally many words, or use replacement 'refine'"
        )
    cross, own = torch.zeros(chunks * length, chunks * length), torch.zeros(chunks * length)
    if swap and replacement != "refine":
        for (_, first, last), (_, begin, end) in zip(*words):
            here, there = rows[0][first:last], rows[1][begin:end]
            for k, i in enumerate(here):
                cross[i, [there[k]] if len(here) == len(there) else there] = (
                    1.0 if len(here) == len(there) else 1 / len(there)
                )
    else:
        ids = [[i for chunk in token_chunks(model, text) for i in chunk] for text in (source, edit)]
        partners = dict(_common(*ids))
        for j, position in enumerate(rows[1]):
            if j in partners:
                cross[rows[0][partners[j]], position] = 1.0
            else:
                own[position] = 1.0
    sizes = [[len(ids) for ids in token_chunks(model, text)] for text in (source, edit)]
    for chunk in range(chunks):
        (n, m), start = [s[chunk] if chunk < len(s) else 0 for s in sizes], chunk * length
        cross[start, start] = cross[start + 1 + n, start + 1 + m] = 1.0
        for position in range(start + 2 + m, start + length):
            (cross[position] if position >= start + 2 + n else own)[position] = 1.0
    for word, factor in reweight:
        spans = [(begin, end) for name, begin, end in words[1] if name == _plain(word)]
        if not spans:
            known = ", ".join(dict.fromkeys(name for name, _, _ in words[1]))
            raise UsageError(f"reweight: the prompt has no word {word!r}; its words are {known}")
        for begin, end in spans:
            columns = rows[1][begin:end]
            cross[:, columns] *= factor
            own[columns] *= factor
    return cross, own


def _positions(model: Model, text: str) -> list[int]:
    """Where each token of a text's words stands in what the text encoder is given, all chunks in a row."""
    return [
        c * model.text_length + 1 + i for c, chunk in enumerate(token_chunks(model, text)) for i in range(len(chunk))
    ]


def _plain(word: str) -> str:
    return word.strip(".,;:!?\"'()").lower()


def _word_spans(model: Model, text: str) -> list[tuple[str, int, int]]:
    """Each word of a text with its first token and the one after its last."""
    tokenizer = model.tokenizer
    spans, at = [], 0
    for word in text.split():
        count = len(tokenizer(word, add_special_tokens=False, verbose=False).input_ids)
        spans.append((_plain(word), at, at + count))
        at += count
    ids = [i for chunk in token_chunks(model, text) for i in chunk]
    if at != len(ids):  # a tokenizer that looks across spaces: each token is a word
        return [(_plain(tokenizer.decode([i])), n, n + 1) for n, i in enumerate(ids)]
    return spans


def _common(source: Sequence[int], edit: Sequence[int]) -> list[tuple[int, int]]:
    """(index in edit, index in source) of the longest common subsequence, as early in the source as can be."""
    rows, columns = len(source), len(edit)
    longest = [[0] * (columns + 1) for _ in range(rows + 1)]
    for i in reversed(range(rows)):
        for j in reversed(range(columns)):
            longest[i][j] = (
                1 + longest[i + 1][j + 1] if source[i] == edit[j] else max(longest[i + 1][j], longest[i][j + 1])
            )
    pairs, i, j = [], 0, 0
    while i < rows and j < columns:
        if source[i] == edit[j]:
            pairs.append((j, i))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
