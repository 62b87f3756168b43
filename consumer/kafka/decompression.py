"""Decompress Kafka's record batches with every codec, up to a limit.

Knows the codecs and puts its functions in the place of aiokafka's, which decompress whatever they are given: a record batch
of 400 kB can hold 400 MB. What it does not know: whose batch it is.
"""

from __future__ import annotations

import mmap
import threading
import zlib
from collections.abc import Callable, Mapping

from aiokafka import codec as client_codec
from aiokafka.record import default_records, legacy_records

try:
    from aiokafka.record._crecords import default_records as compiled_default_records
    from aiokafka.record._crecords import legacy_records as compiled_legacy_records
except ImportError:  # aiokafka without its extension modules
    compiled_default_records, compiled_legacy_records = default_records, legacy_records

try:
    import cramjam
except ImportError:
    cramjam = None  # type: ignore[assignment]

from consumer.core.errors import Misconfigured

_GZIP_WINDOW = 31  # zlib: the largest window, with gzip's header and trailer
_KEPT_BYTES_MAX = 8 << 20  # a buffer that was filled beyond this is freed
_XERIAL = b"\x82SNAPPY\x00"
_XERIAL_HEADER_BYTES = 16
_OUTPUT_FULL = "failed to write whole buffer"  # cramjam's text, of lz4 and of zstd


class TooLarge(Exception):
    """A batch decompresses to more than the limit."""


class Damaged(Exception):
    """The compressed bytes are cut short or are not of their codec."""


class _Local(threading.local):
    output: mmap.mmap | None = None


class _Limit:
    bytes_max = 64 << 20


_local = _Local()


def prepare(bytes_max: int) -> None:
    """Set the limit of this process.

    Raises Misconfigured if a codec is missing.
    """
    if cramjam is None:
        raise Misconfigured(
            "Kafka codecs: the package cramjam is missing, so that topics compressed with snappy, lz4 or zstd cannot be read; "
            "run `pip install cramjam`"
        )
    if bytes_max != _Limit.bytes_max:
        _Limit.bytes_max = bytes_max
        _local.output = None
    for module in (client_codec, default_records, legacy_records, compiled_default_records, compiled_legacy_records):
        for name, function in _FUNCTIONS.items():
            if hasattr(module, name):
                setattr(module, name, function)


def gzip_decode(payload: bytes) -> bytes:
    """All members of a gzip stream."""
    left = bytes(payload)
    parts: list[bytes] = []
    room = _Limit.bytes_max
    try:
        while left:
            member = zlib.decompressobj(_GZIP_WINDOW)
            parts.append(member.decompress(left, room + 1))
            room -= len(parts[-1])
            if room < 0:
                raise TooLarge
            if not member.eof:
                raise Damaged("the gzip stream is cut short")
            left = member.unused_data
    except zlib.error as error:
        raise Damaged(f"gzip: {error}") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def snappy_decode(payload: bytes) -> bytes:
    """One snappy block, or the blocks that Java's xerial library writes."""
    payload = bytes(payload)
    if not payload.startswith(_XERIAL) or len(payload) < _XERIAL_HEADER_BYTES:
        return _snappy_block(payload, _Limit.bytes_max)
    parts: list[bytes] = []
    room, position = _Limit.bytes_max, _XERIAL_HEADER_BYTES
    while position < len(payload):
        begin = position + 4
        position = begin + int.from_bytes(payload[position:begin], "big", signed=True)
        if not begin <= position <= len(payload):
            raise Damaged("a snappy block is longer than its batch")
        parts.append(_snappy_block(payload[begin:position], room))
        room -= len(parts[-1])
    return b"".join(parts)


def _snappy_block(block: bytes, room: int) -> bytes:
    try:
        if cramjam.snappy.decompress_raw_len(block) > room:
            raise TooLarge
        return bytes(cramjam.snappy.decompress_raw(block))
    except cramjam.DecompressionError as error:
        raise Damaged(f"snappy: {error}") from None


def lz4_decode(payload: bytes) -> bytes:
    """An lz4 frame."""
    return _into_buffer("lz4", cramjam.lz4.decompress_into, payload)


def zstd_decode(payload: bytes) -> bytes:
    """A zstd frame."""
    return _into_buffer("zstd", cramjam.zstd.decompress_into, payload)


def _into_buffer(name: str, decompress: Callable[[bytes, mmap.mmap], int], payload: bytes) -> bytes:
    """Decompress into a buffer as large as the limit.

    The system allocates only the pages that are written.
    """
    output = _local.output or mmap.mmap(-1, _Limit.bytes_max)
    # Not kept while it is in use: cramjam lets other threads run.
    _local.output = None
    try:
        size = decompress(bytes(payload), output)
    except cramjam.DecompressionError as error:
        if _OUTPUT_FULL in str(error):
            raise TooLarge from None
        raise Damaged(f"{name}: {error}") from None
    decompressed = output[:size]
    if size <= _KEPT_BYTES_MAX:
        _local.output = output
    return decompressed


_FUNCTIONS: Mapping[str, Callable[[bytes], bytes]] = {
    "gzip_decode": gzip_decode,
    "snappy_decode": snappy_decode,
    "lz4_decode": lz4_decode,
    "zstd_decode": zstd_decode,
}
BY_CODEC: Mapping[int, Callable[[bytes], bytes]] = {
    0: bytes,
    1: gzip_decode,
    2: snappy_decode,
    3: lz4_decode,
    4: zstd_decode,
}
