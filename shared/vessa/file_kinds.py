"""Tell a file's kind by its first bytes, never by its name."""

import zlib

_NIFTI_SIZES = {348, 540}
_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"II+\0", "TIFF"),
    (b"MM\0+", "TIFF"),
    (b"NRRD000", "NRRD"),
    (b"ObjectType", "MetaImage"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    (b"RIFF", "WebP"),
    (b"%PDF", "PDF"),
    (b"PK\3\4", "zip"),
    (b"7z\xbc\xaf", "7z"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ", "xz"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x01\x00\x00\x01\x00", "MGH"),
)
HEAD = 4096  # bytes that every test here is content with


def gunzipped(head: bytes, size: int = 352) -> bytes:
    """Return the first `size` bytes of gzip data, or `head` itself when it is no gzip data."""
    if head[:2] != b"\x1f\x8b":
        return head
    found = b""
    try:
        while len(found) < size and head:  # block gzip has many members
            member = zlib.decompressobj(31)
            found += member.decompress(head, size - len(found))
            head = member.unused_data
    except zlib.error:
        return found
    return found


def is_nifti(head: bytes) -> bool:
    """Tell whether a file begins as NIfTI-1 or NIfTI-2 does, compressed or not."""
    head = gunzipped(head)
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    return bool(sizes & _NIFTI_SIZES) and (head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2"))


def is_analyze(head: bytes) -> bool:
    """Tell whether a file begins as the header of an Analyze pair does."""
    head = gunzipped(head)
    return len(head) >= 348 and 348 in (int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big"))


def is_dicom(head: bytes) -> bool:
    """Tell whether a file begins as DICOM does: 128 bytes of anything, then DICM."""
    return head[128:132] == b"DICM"


def is_bare_dicom(head: bytes) -> bool:
    """Tell whether a file is a DICOM data set without preamble: it begins with an element of a low group."""
    group, element = int.from_bytes(head[:2], "little"), int.from_bytes(head[2:4], "little")
    if group not in (2, 8) or element > 0x0100 or len(head) < 12:
        return False
    explicit = head[4:6].isalpha() and head[4:6].isupper()
    return explicit or int.from_bytes(head[4:8], "little") <= 256


def is_tiff(head: bytes) -> bool:
    """Tell whether a file begins as TIFF or BigTIFF does."""
    return kind_of(head) == "TIFF"


def kind_of(head: bytes) -> str:
    """Return the name of a file's kind, "" for one that is not known here."""
    if is_nifti(head):
        return "NIfTI"
    if is_dicom(head):
        return "DICOM"
    if is_analyze(head):
        return "Analyze"
    for magic, kind in _MAGIC:
        if head.startswith(magic):
            return kind
    if head[:2] == b"\x1f\x8b":
        inner = kind_of(gunzipped(head)) if gunzipped(head) not in (b"", head) else ""
        return f"gzip of a {inner}" if inner else "gzip"
    return "DICOM without preamble" if is_bare_dicom(head) else ""
