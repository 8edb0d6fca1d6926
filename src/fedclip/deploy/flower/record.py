"""Bytes as Flower carries them; loads no torch, as a site's app starts anew for each message."""

from __future__ import annotations

from flwr.app import Array, ArrayRecord, RecordDict

RECORD, ARRAY = "fedclip", "message"


def record_of(data: bytes) -> RecordDict:
    """Bytes as a record; an array, because Flower sends long ones in pieces."""
    array = Array("uint8", (len(data),), "fedclip.bytes", data)
    return RecordDict({RECORD: ArrayRecord({ARRAY: array})})


def bytes_of(content: RecordDict) -> bytes:
    """The bytes in a record; raises KeyError where there are none."""
    return bytes(content.array_records[RECORD][ARRAY].data)
