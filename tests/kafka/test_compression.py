"""Every codec decompresses, within the limit, or raises."""

from __future__ import annotations

import gzip
import os

import cramjam
import pytest
from aiokafka import codec as client_codec
from hypothesis import given, settings, strategies

from consumer.kafka import decompression
from consumer.kafka.decompression import BY_CODEC, Damaged, TooLarge, gzip_decode, snappy_decode

NAMES = {1: "gzip", 2: "snappy", 3: "lz4", 4: "zstd"}
LIMIT = 1 << 20
DATA = os.urandom(1000) + b"a" * 100_000


@pytest.fixture(autouse=True)
def small_limit() -> None:
    decompression.prepare(LIMIT)


def packed(codec: int, data: bytes) -> bytes:
    return bytes(getattr(client_codec, f"{NAMES[codec]}_encode")(data))


@pytest.mark.parametrize("codec", NAMES)
def test_decompression_gives_what_was_compressed_up_to_the_limit_exactly(codec: int) -> None:
    for data in (b"", b"x", DATA, bytes(LIMIT)):
        assert BY_CODEC[codec](packed(codec, data)) == data
        assert BY_CODEC[codec](memoryview(packed(codec, data))) == data  # type: ignore[arg-type]
    for size in (LIMIT + 1, 40 * LIMIT):
        with pytest.raises(TooLarge):
            BY_CODEC[codec](packed(codec, bytes(size)))
    assert BY_CODEC[codec](packed(codec, DATA)) == DATA  # still, after a refusal


@pytest.mark.parametrize("codec", NAMES)
@given(cut=strategies.integers(1, 900))
@settings(max_examples=25, deadline=None)
def test_decompression_of_a_cut_stream_is_damaged(codec: int, cut: int) -> None:
    with pytest.raises(Damaged):
        BY_CODEC[codec](packed(codec, DATA)[:-cut])


@pytest.mark.parametrize("codec", NAMES)
@given(noise=strategies.binary(min_size=1, max_size=200))
@settings(max_examples=50, deadline=None)
def test_decompression_of_noise_raises_nothing_else(codec: int, noise: bytes) -> None:
    try:
        BY_CODEC[codec](noise)
    except (Damaged, TooLarge):
        pass


def test_decompression_takes_what_other_clients_write() -> None:
    assert snappy_decode(bytes(cramjam.snappy.compress_raw(DATA))) == DATA  # librdkafka: no xerial blocks
    assert gzip_decode(gzip.compress(DATA[:50]) + gzip.compress(DATA[50:])) == DATA
    xerial = b"\x82SNAPPY\x00" + (1).to_bytes(4, "big") * 2
    for length in (-1, 1 << 30):
        with pytest.raises(Damaged):
            snappy_decode(xerial + length.to_bytes(4, "big", signed=True) + b"rest")
