"""Text to token ids: cut at the end token, padded only to the longest of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


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

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text with begin and end; a text that is too long loses its last words."""
        room = self.max_length - 2
        return [[self.begin, *ids[:room], self.end] for ids in self._encode_plain(list(texts))]

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
