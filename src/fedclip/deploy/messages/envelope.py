"""A message: a header of plain facts and tensors, in one safetensors file.

The header is JSON in the file's metadata. What comes from another machine is read without trust:
whatever is wrong with it is a `BadMessage`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fedclip.errors import FedclipError, UsageError, one_line, shortened
from fedclip.files import parse_json
from fedclip.records import plain_json

if TYPE_CHECKING:
    import torch

VERSION = 1
_HEADER = "header"
_LARGEST_HEADER = 50_000_000


class BadMessage(FedclipError):
    """A message that is not what was expected; the text says why.

    It may quote what another machine wrote: it is one short line that cannot steer a terminal.
    """

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


@dataclass(frozen=True)
class Envelope:
    """A message's header, and its tensors by name."""

    header: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """What the message is about."""
        return str(self.header.get("kind"))

    def pack(self) -> bytes:
        """The message as bytes; numbers that JSON cannot hold become null."""
        text = json.dumps(plain_json({"version": VERSION, **self.header}), separators=(",", ":"))
        if not self.tensors:
            return pack_header(text)
        from safetensors.torch import save

        return bytes(save(dict(self.tensors), metadata={_HEADER: text}))

    @classmethod
    def unpack(cls, data: bytes, largest: int | None = None) -> Envelope:
        """A message from bytes; raises BadMessage, also where there are more than `largest`."""
        if largest is not None and len(data) > largest:
            raise BadMessage(
                f"the message has {len(data)} bytes; {largest} are the most that is taken"
            )
        header = read_header(data)
        if header.get("version") != VERSION:
            raise BadMessage(
                f"the message is of version {shortened(header.get('version'))} of the format, here "
                f"it is {VERSION}; install the same fedclip everywhere"
            )
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            return cls(header, load(data))
        except (
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
            RuntimeError,
            OverflowError,
        ) as error:
            raise BadMessage(f"the message cannot be read: {error}") from None


def pack_header(text: str) -> bytes:
    """A message without tensors, made without torch: a safetensors file that is all header."""
    frame = json.dumps({"__metadata__": {_HEADER: text}}, separators=(",", ":")).encode()
    frame += b" " * (-len(frame) % 8)
    return len(frame).to_bytes(8, "little") + frame


def read_header(data: bytes) -> dict[str, Any]:
    """The header of a message; raises BadMessage where there is none."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > min(len(data) - 8, _LARGEST_HEADER):
        raise BadMessage("the message is cut off, or is none of fedclip's")
    try:
        frame = parse_json(data[8 : 8 + size], "the frame")
        header = parse_json(frame["__metadata__"][_HEADER], "the header")
    except (UsageError, KeyError, TypeError, AttributeError):
        raise BadMessage("the message has no header; it is none of fedclip's") from None
    if not isinstance(header, dict):
        raise BadMessage("the message's header is no mapping")
    return header
