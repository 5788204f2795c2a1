"""The inflater against Python's own gzip: members, damage, budget, and pieces of any size."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from medsam_lora.io import inflate
from medsam_lora.io.inflate import GzipStream, InflateError, OverBudget

# Longer than the inflater's pieces of input and output, partly incompressible and partly zeros.
CONTENT = np.random.default_rng(0).integers(0, 256, 700_000, np.uint8).tobytes() + bytes(5_000_000) + b"brain"


def whole(data: bytes, size: int) -> tuple[bytes, GzipStream]:
    stream, buffer = GzipStream(data), bytearray(size)
    filled = stream.read_into(memoryview(buffer))
    return bytes(buffer[:filled]), stream


def test_a_stream_longer_than_the_pieces_is_what_gzip_makes_of_it() -> None:
    content, stream = whole(gzip.compress(CONTENT), len(CONTENT))
    assert content == CONTENT
    assert stream.finish(0) == 0 and stream.ended and stream.junk == 0


@pytest.mark.parametrize("step", [1, 7, 2**20 - 1, 2**20, 2**20 + 1])
def test_it_goes_on_where_it_stopped(step: int) -> None:
    content = CONTENT[-2_500_000:] if step > 7 else CONTENT[:300]
    stream, pieces = GzipStream(gzip.compress(content)), []
    while True:
        buffer = bytearray(step)
        filled = stream.read_into(memoryview(buffer))
        pieces.append(bytes(buffer[:filled]))
        if filled < step:
            break
    assert b"".join(pieces) == content and stream.ended


def test_members_follow_each_other_and_padding_and_junk_follow_them() -> None:
    data = gzip.compress(b"brain ") + bytes(512) + gzip.compress(b"tumour") + bytes(100) + b"junk"
    content, stream = whole(data, 100)
    assert content == b"brain tumour" == gzip.decompress(data[:-104])
    assert stream.ended and stream.junk == 4


def test_thousands_of_members_cost_what_their_bytes_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind each member the next is looked for; not in all that is left of the file."""
    data = b"".join(gzip.compress(bytes([n % 256])) for n in range(3000)) + bytes(10_000)
    looked_at = 0
    leading_zeros = inflate._leading_zeros

    class Counted:
        """The rest of the file, which counts the bytes that are read of it."""

        def __init__(self, view: memoryview) -> None:
            self.view = view

        def __len__(self) -> int:
            return len(self.view)

        def __bytes__(self) -> bytes:
            nonlocal looked_at
            looked_at += len(self.view)
            return bytes(self.view)

        def __getitem__(self, part: slice) -> Counted:
            return Counted(self.view[part])

    monkeypatch.setattr(inflate, "_leading_zeros", lambda view: leading_zeros(Counted(view)))
    content, stream = whole(data, 4000)
    assert content == bytes(n % 256 for n in range(3000))
    assert stream.finish(0) == 0 and stream.ended and stream.junk == 0
    assert looked_at < 3000 * 1024 + 20_000 < len(data) * 3000 / 10


@pytest.mark.parametrize("missing", [1, 4, 8, 9, 1000])
def test_a_cut_stream_is_found_be_it_in_its_last_byte(missing: int) -> None:
    stream, buffer = GzipStream(gzip.compress(CONTENT)[:-missing]), bytearray(len(CONTENT))
    with pytest.raises(EOFError, match="end-of-stream"):
        stream.read_into(memoryview(buffer))
        stream.finish(0)


@pytest.mark.parametrize("place", [-1, -5, -8])
def test_checksum_and_length_are_checked(place: int) -> None:
    data = bytearray(gzip.compress(CONTENT))
    data[place] ^= 1
    stream, buffer = GzipStream(bytes(data)), bytearray(len(CONTENT))
    with pytest.raises(InflateError, match="check"):
        stream.read_into(memoryview(buffer))
        stream.finish(0)


def test_no_more_is_made_than_the_budget() -> None:
    stream, start = GzipStream(gzip.compress(bytes(10**8))), bytearray(10)
    assert stream.read_into(memoryview(start)) == 10
    with pytest.raises(OverBudget, match="1000"):
        stream.finish(1000)
    stream = GzipStream(gzip.compress(bytes(1010)))
    assert (stream.read_into(memoryview(start)), stream.finish(1000)) == (10, 1000)
