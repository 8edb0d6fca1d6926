"""Text to token ids: cut at the end token, padded only to the longest of a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch

from fedclip.errors import FedclipWarning, shortened


class Tokens:
    """A tokenizer as a text tower needs it.

    `encode_plain` gives the ids of each text without begin and end; `begin` and `end` are the ids
    that the tower was trained with, `max_length` its number of positions (both ends included).
    """

    def __init__(
        self,
        encode_plain: Callable[[list[str]], list[list[int]]],
        *,
        begin: int,
        end: int,
        max_length: int,
    ) -> None:
        self._encode_plain = encode_plain
        self.begin = begin
        self.end = end
        self.max_length = max_length
        self._told: set[str] = set()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with begin and end; a text that is too long loses its last words.

        Each such text is told of once, by a `FedclipWarning`.
        """
        texts, room = list(texts), self.max_length - 2
        plain = self._encode_plain(texts)
        cut = {text for text, ids in zip(texts, plain, strict=True) if len(ids) > room}
        if cut - self._told:
            first = next(text for text in texts if text in cut - self._told)
            count = len(cut - self._told)
            self._told |= cut
            warnings.warn(
                f"the text tower reads {self.max_length} tokens of a text, and {count} texts are "
                f"longer and lose their end: {shortened(first)}; shorten the class names, the "
                "templates or the captions",
                FedclipWarning,
                stacklevel=3,
            )
        return [[self.begin, *ids[:room], self.end] for ids in plain]

    def read(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """What the text tower sees of each text: equal for texts that have one feature."""
        return [tuple(row) for row in self.encode(texts)]

    def pad(self, rows: Sequence[Sequence[int]], length: int | None = None) -> torch.Tensor:
        """Stack ids to int64 `[texts, longest]`, or to a given length.

        Padding repeats the end token: attention is causal and the first end token is pooled, so
        what stands after it changes nothing.
        """
        length = length or max(len(row) for row in rows)
        return torch.tensor([[*row, *[self.end] * (length - len(row))] for row in rows])


def remapped(tokens: Tokens, *, vocab_size: int, begin: int, end: int, max_length: int) -> Tokens:
    """The same words for another vocabulary, in which `begin` and `end` have other ids.

    Ids that do not fit are folded onto ones that do; only random weights are read this way.
    """
    taken = {begin, end}
    free = [index for index in range(vocab_size) if index not in taken]

    def fold(index: int) -> int:
        fits = index < vocab_size and index not in taken
        return index if fits else free[index % len(free)]

    def encode_plain(texts: list[str]) -> list[list[int]]:
        return [[fold(index) for index in row[1:-1]] for row in tokens.encode(texts)]

    return Tokens(encode_plain, begin=begin, end=end, max_length=max_length)
