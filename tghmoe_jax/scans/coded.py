"""The size that a compressed frame itself states, read from its markers without decoding it.

A decoder takes memory for the size in the frame, whatever the file around it states.
"""

_NO_FRAME = {0xC4, 0xC8, 0xCC}  # DHT, JPG and DAC lie among the markers that start a frame (ITU-T T.81, table B.1)
_ALONE = {0x01, *range(0xD0, 0xD8)}  # markers without a length


def coded_shape(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) of a JPEG, JPEG-LS or JPEG 2000 frame (codestream or JP2); None for another coding, such as RLE.

    ValueError where the frame ends before it states its size.
    """
    if frame[:4] == b"\xff\x4f\xff\x51":
        return _siz(frame, 2)
    if frame[4:8] == b"jP  ":
        return _siz(frame, frame.index(b"\xff\x4f\xff\x51") + 2)
    if frame[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 4 <= len(frame):
        if frame[place] != 0xFF:
            raise ValueError("no marker")
        marker = frame[place + 1]
        if marker == 0xFF or marker in _ALONE:  # fill bytes
            place += 1 if marker == 0xFF else 2
            continue
        if marker == 0xF7 or (0xC0 <= marker <= 0xCF and marker not in _NO_FRAME):  # 0xF7: JPEG-LS (T.87)
            return int.from_bytes(frame[place + 5 : place + 7]), int.from_bytes(frame[place + 7 : place + 9])
        place += 2 + max(2, int.from_bytes(frame[place + 2 : place + 4]))
    raise ValueError("no start of a frame")


def _siz(frame: bytes, marker: int) -> tuple[int, int]:
    """From the SIZ marker segment (T.800, A.5.1): Lsiz, Rsiz, Xsiz, Ysiz, XOsiz, YOsiz."""
    if len(frame) < marker + 22:
        raise ValueError("cut short")
    x, y, x0, y0 = (int.from_bytes(frame[start : start + 4]) for start in range(marker + 6, marker + 22, 4))
    return y - y0, x - x0
