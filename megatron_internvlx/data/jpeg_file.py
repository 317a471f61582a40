"""Check that no decoder will reject a JPEG file, without decoding it.

libjpeg reports missing parts and wrong tables as errors. It ignores wrong bits inside a scan and returns wrong pixels.
Numbers are those of ITU T.81: annex B for segments, C for Huffman tables.
"""

import re

_SOI, _EOI, _SOS, _DQT, _DHT = 0xD8, 0xD9, 0xDA, 0xDB, 0xC4
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive, all with Huffman codes
# Other segments, whose contents are not checked: restart interval, comment, application data.
_OTHERS = (0xDD, 0xFE, *range(0xE0, 0xF0))
# In a scan 0xFF is followed by 0 or a restart marker; another marker ends it.
_NEXT_MARKER = re.compile(rb"\xff(?=[^\x00\xd0-\xd7])")


def is_whole_jpeg(data: bytes) -> bool:
    """Whether every segment and table is present and in range, and an end marker follows the last scan."""
    frame: dict[int, int] | None = None  # component -> quantization table
    quantization: set[int] = set()
    huffman: set[int] = set()
    place, scans, progressive = 2, 0, False
    if data[:2] != bytes((0xFF, _SOI)):
        return False
    while place + 4 <= len(data) or data[place : place + 2] == bytes((0xFF, _EOI)):
        marker = data[place + 1]
        if data[place] != 0xFF:
            return False
        if marker == 0xFF:  # fill byte
            place += 1
            continue
        if marker == _EOI:
            return scans > 0
        length = int.from_bytes(data[place + 2 : place + 4], "big")
        body = data[place + 4 : place + 2 + length]
        place += 2 + length
        if length < 2 or len(body) != length - 2:
            return False
        if marker in _FRAMES and frame is None:
            frame, progressive = _components(body), marker == _FRAMES[2]
            good = frame is not None
        elif marker == _DQT:
            good = _quantization(body, quantization)
        elif marker == _DHT:
            good = _huffman(body, huffman)
        elif marker == _SOS and frame is not None:
            good = _scan(body, frame, quantization, huffman) and not (progressive and _out_of_order(body))
            scans += 1
            found = _NEXT_MARKER.search(data, place)
            place = found.start() if found else len(data)
        else:
            good = marker in _OTHERS
        if not good:
            return False
    return False


def _components(body: bytes) -> dict[int, int] | None:
    """Components of a frame and their quantization tables; None if the frame is not valid."""
    if len(body) < 6 or body[0] != 8 or body[5] not in (1, 3, 4) or len(body) != 6 + 3 * body[5]:
        return None
    parts = [body[i : i + 3] for i in range(6, len(body), 3)]
    sampled = all(1 <= part[1] >> 4 <= 4 and 1 <= part[1] & 15 <= 4 and part[2] <= 3 for part in parts)
    found = {part[0]: part[2] for part in parts}
    blocks = sum((part[1] >> 4) * (part[1] & 15) for part in parts)
    return found if sampled and len(found) == body[5] and (blocks <= 10 or len(parts) == 1) else None


def _quantization(body: bytes, known: set[int]) -> bool:
    place = 0
    while place < len(body):
        kind = body[place]
        if kind >> 4 > 1 or kind & 15 > 3:
            return False
        known.add(kind & 15)
        place += 65 + 64 * (kind >> 4)
    return place == len(body)


def _huffman(body: bytes, known: set[int]) -> bool:
    place = 0
    while place + 17 <= len(body):
        kind, counts = body[place], body[place + 1 : place + 17]
        symbols = body[place + 17 : place + 17 + sum(counts)]
        if kind & 0xEF > 3 or len(symbols) != sum(counts) or len(symbols) > 256:
            return False
        if kind < 16 and any(symbol > 15 for symbol in symbols):
            return False
        code = 0
        for bits, count in enumerate(counts, 1):
            code = 2 * code + count
            if code > 1 << bits:
                return False
        known.add(kind)
        place += 17 + len(symbols)
    return place == len(body)


def _scan(body: bytes, frame: dict[int, int], quantization: set[int], huffman: set[int]) -> bool:
    """Whether the components and tables that a scan names exist."""
    if not body or not 1 <= body[0] <= 4 or len(body) != 4 + 2 * body[0]:
        return False
    parts = [body[i : i + 2] for i in range(1, len(body) - 3, 2)]
    first, last, bits = body[-3:]
    if (
        first > last
        or last > 63
        or bits >> 4 > 13
        or bits & 15 > 13
        or len({part[0] for part in parts}) != len(parts)
    ):
        return False
    for component, tables in parts:
        needed = {tables >> 4} if first == 0 and not bits >> 4 else set()
        needed |= {16 + (tables & 15)} if last else set()
        if component not in frame or frame[component] not in quantization or not needed <= huffman:
            return False
    return True


def _out_of_order(body: bytes) -> bool:
    """Whether the bounds of a scan are forbidden in a progressive file (annex G)."""
    first, last, bits = body[-3:]
    before, now = bits >> 4, bits & 15
    return (first == 0) != (last == 0) or (first > 0 and body[0] > 1) or (before > 0 and now != before - 1)
