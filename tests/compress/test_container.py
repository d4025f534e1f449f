"""The container: what goes in comes out, and nothing else is let in."""

from zlib import crc32

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress.container import MAGIC, Container, header_length
from foveate.compress.fields import Reader, signed, varint
from foveate.errors import BitstreamError, InputError

NAMES = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,14}", fullmatch=True)
CONTAINERS = st.builds(
    Container,
    method=st.from_regex(r"[a-z0-9][a-z0-9-]{0,62}", fullmatch=True),
    width=st.integers(1, 2**15),
    height=st.integers(1, 2**15),
    channels=st.integers(1, 4),
    sections=st.dictionaries(NAMES, st.binary(max_size=40), max_size=5),
    bits=st.sampled_from([8, 16, 32]),
)
PLAIN = Container("demo", 6, 4, 3, {"base": b"abc", "fine": b"defg"})


@settings(deadline=None, max_examples=50)
@given(CONTAINERS)
def test_what_goes_in_comes_out(container: Container) -> None:
    back = Container.read(container.to_bytes())
    assert back == container
    assert list(back.sections) == list(container.sections)
    assert back.complete


def test_the_bytes_are_those_of_the_documentation() -> None:
    data = PLAIN.to_bytes()
    body = b"\x03\x04demo\x06\x04\x02\x04base\x03" + crc32(b"abc").to_bytes(4, "little")
    body += b"\x04fine\x04" + crc32(b"defg").to_bytes(4, "little")
    head = b"\x8fFOV\x01" + len(body).to_bytes(2, "little") + body
    assert data == head + crc32(head).to_bytes(4, "little") + b"abcdefg"
    assert header_length(data) == len(data) - 7


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_any_change_is_noticed(data: st.DataObject) -> None:
    whole = PLAIN.to_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[at] ^= data.draw(st.integers(1, 255))
    for prefix in (False, True):
        with pytest.raises(BitstreamError):
            Container.read(bytes(changed), allow_prefix=prefix)


@pytest.mark.parametrize("length", range(len(PLAIN.to_bytes())))
def test_a_file_cut_off_is_refused_or_read_as_far_as_it_goes(length: int) -> None:
    data = PLAIN.to_bytes()[:length]
    with pytest.raises(BitstreamError):
        Container.read(data)
    if length < header_length(PLAIN.to_bytes()):
        with pytest.raises(BitstreamError):
            Container.read(data, allow_prefix=True)
        return
    part = Container.read(data, allow_prefix=True)
    whole = length >= header_length(PLAIN.to_bytes()) + 3
    assert (list(part.sections), part.missing) == ((["base"], ("fine",)) if whole else ([], ("base", "fine")))
    with pytest.raises(BitstreamError, match="without its section 'fine'"):
        part.section("fine")
    with pytest.raises(InputError, match="missing"):
        part.to_bytes()


def _sealed(body: bytes) -> bytes:
    head = MAGIC + b"\x01" + len(body).to_bytes(2, "little") + body
    return head + crc32(head).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"\x03\x01x" + varint(10**9, 10**9) + b"\x00", "1000000000x1000000000 pixels"),
        (b"\x03\x01x" + varint(0, 5) + b"\x00", "0x5 pixels"),
        (b"\x05\x01x\x01\x01\x00", "5 channels"),
        (b"\x33\x01x\x01\x01\x00", "3 channels of 0 bits"),
        (b"\x03\x02X!\x01\x01\x00", "method called 'X!'"),
        (b"\x03\x01x\x01\x01\x01\x02A!\x00" + bytes(4), "section called 'A!'"),
        (b"\x03\x01x\x01\x01\x02" + 2 * (b"\x01a\x00" + bytes(4)), "2 sections, 1 different"),
        (b"\x03\x01x\x01\x01\x02" + b"".join(b"\x01" + n + varint(2**31) + bytes(4) for n in (b"a", b"b")), "sections"),
        (b"\x03\x01x\x01\x01\x01\x01a" + varint(2**40) + bytes(4), "not within"),
        (b"\x03\x01x\x01\x01\x00more", "4 bytes too many"),
        (b"\x03\x01x\x01\x01\xff", "wanted"),
        (b"\x03\x01x" + b"\xff" * 12, "has no end"),
        (b"", "wanted"),
    ],
)
def test_a_header_with_a_right_checksum_and_a_lie_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(BitstreamError, match=problem):
        Container.read(_sealed(body))


@pytest.mark.parametrize("data", [b"", b"\x8f", b"\x89PNG\r\n\x1a\n" + bytes(60), b"text", bytes(100), MAGIC])
def test_foreign_files_are_refused(data: bytes) -> None:
    with pytest.raises(BitstreamError):
        Container.read(data)


def test_a_newer_version_and_bytes_too_many_are_named() -> None:
    data = PLAIN.to_bytes()
    with pytest.raises(BitstreamError, match="version 2"):
        Container.read(data[:4] + b"\x02" + data[5:])
    with pytest.raises(BitstreamError, match=f"{len(data) + 1} bytes"):
        Container.read(data + b"\0")


@pytest.mark.parametrize(
    "change",
    [{"method": "No"}, {"width": 0}, {"height": 2**30}, {"channels": 5}, {"bits": 12}, {"sections": {"": b""}}],
)
def test_what_no_file_can_hold_is_refused_when_it_is_made(change: dict) -> None:
    given = {"method": "m", "width": 2, "height": 2, "channels": 1, "sections": {}} | change
    with pytest.raises(InputError):
        Container(**given)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**63 - 1), max_size=5), st.lists(st.integers(-(2**62), 2**62 - 1), max_size=5))
def test_numbers_come_back(whole: list[int], either: list[int]) -> None:
    fields = Reader(varint(*whole) + signed(*either), "test")
    assert [fields.varint() for _ in whole] == whole
    assert [fields.signed() for _ in either] == either
    fields.end()


def test_a_reader_takes_nothing_on_trust() -> None:
    with pytest.raises(BitstreamError, match="wanted"):
        Reader(b"1234", "test").array("<f4", 2**60)
    with pytest.raises(BitstreamError, match="NaN"):
        Reader(b"\xff\xff\xff\xff", "test").array("<f4", 1)
    with pytest.raises(BitstreamError, match="not within"):
        Reader(varint(9), "test").varint(most=8)
    with pytest.raises(BitstreamError, match="too many"):
        Reader(b"1", "test").end()
    assert Reader(b"\x01\x02", "test").array("<u2", 1).tolist() == [513]
