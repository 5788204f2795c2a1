"""Inflating gzip streams to their end, with the checksum checked and a budget kept."""

from __future__ import annotations

import zlib

GZIP_MAGIC = b"\x1f\x8b"


class OverBudget(Exception):
    """The stream inflates to more bytes than it may."""


def inflate(data: bytes, budget: int) -> tuple[bytes, int]:
    """Inflate a gzip stream of one or more members to its end.

    The CRC and the length at the end of every member are checked, which a reader that stops at the last voxel never
    does; and no more than `budget` bytes are ever made, whatever the stream would inflate to.

    Parameters
    ----------
    data : bytes
        Beginning with a gzip member.
    budget : int
        Largest number of inflated bytes.

    Returns
    -------
    content : bytes
    junk : int
        Bytes after the last member that belong to no member; zero padding, which tapes leave, is not counted.

    Raises
    ------
    EOFError
        Where the stream is cut, be it in its last four bytes.
    zlib.error
        Where it is damaged or fails its checksum.
    OverBudget
        Where it inflates to more than `budget` bytes.

    Examples
    --------
    >>> import gzip
    >>> inflate(gzip.compress(b"brain") + b"junk", budget=100)
    (b'brain', 4)
    """
    pieces: list[bytes] = []
    room = budget
    rest = data
    while True:
        member = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        while not member.eof:
            if not rest:
                raise EOFError("the stream ends before its end-of-stream marker")
            # One byte over the budget shows that there is more without making it; 0 would mean no limit.
            piece = member.decompress(rest, room + 1)
            room -= len(piece)
            if room < 0:
                raise OverBudget(f"more than {budget} bytes")
            pieces.append(piece)
            rest = member.unconsumed_tail
        rest = member.unused_data.lstrip(b"\0")
        if not rest.startswith(GZIP_MAGIC):
            return b"".join(pieces), len(rest)
