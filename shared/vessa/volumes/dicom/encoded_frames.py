"""Compare the sizes that compressed DICOM frames state with the header, before a decoder believes either."""

from pydicom import Dataset, uid
from pydicom.encaps import generate_frames

from vessa.errors import InvalidImage

_MAX_SCANS = 100  # of a JPEG; a progressive one has about ten
_RLE = uid.RLELossless


def check_encoded(file: Dataset, count: int, size: tuple[int, int]) -> None:
    """Raise InvalidImage when frames have another size or number than the header declares.

    file: compressed, with its pixels; count: frames; size: (rows, columns)
    """
    frames = list(generate_frames(file.PixelData, number_of_frames=count))
    if len(frames) != count:
        raise InvalidImage(f"the DICOM file holds {len(frames)} frames, and its header declares {count}")
    pixels = size[0] * size[1] * int(file.get("SamplesPerPixel", 1)) * -(-int(file.BitsAllocated) // 8)
    for frame in frames:
        if file.file_meta.TransferSyntaxUID == _RLE:
            # At its worst RLE adds one byte to 128, and pads each row.
            fits = len(frame) <= pixels * 129 // 128 + size[0] * 16 + 1024 and _rle_fills(frame, pixels)
        else:
            stated = _stated_size(frame)
            fits = stated is None or stated == size
            if frame.count(b"\xff\xda") > _MAX_SCANS and stated is not None and frame[:3] == b"\xff\xd8\xff":
                raise InvalidImage(f"a DICOM frame is a JPEG of more than {_MAX_SCANS} scans")
        if not fits:
            raise InvalidImage("the compressed DICOM frames have another size than the header declares")


def _rle_fills(frame: bytes, pixels: int) -> bool:
    """Tell whether the first RLE segment unpacks to its share of the pixels, give or take padding."""
    segments = int.from_bytes(frame[:4], "little")
    if not 1 <= segments <= 15:
        return False
    starts = [int.from_bytes(frame[4 * i : 4 * i + 4], "little") for i in range(1, segments + 1)]
    end = starts[1] if segments > 1 else len(frame)
    place, unpacked = starts[0], 0
    while place < end:
        control = frame[place]
        if control < 128:
            unpacked, place = unpacked + control + 1, place + control + 2
        elif control > 128:
            unpacked, place = unpacked + 257 - control, place + 2
        else:
            place += 1
        if unpacked > pixels:
            return False
    return pixels // segments <= unpacked <= pixels // segments + 256


def _stated_size(frame: bytes) -> tuple[int, int] | None:
    """Return (rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream states; None for one without a size."""
    if frame[:4] == b"\xff\x4f\xff\x51":
        ends = [int.from_bytes(frame[at : at + 4], "big") for at in (8, 12, 16, 20)]
        return ends[1] - ends[3], ends[0] - ends[2]
    if frame[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 < len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker == 0xFF:
            place += 1
            continue
        if (0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)) or marker == 0xF7:
            return int.from_bytes(frame[place + 5 : place + 7], "big"), int.from_bytes(
                frame[place + 7 : place + 9], "big"
            )
        place += 2 + int.from_bytes(frame[place + 2 : place + 4], "big")
    return None
