"""The folder of an image as the name of its patient."""

import hashlib
import os

_LONGEST = 128  # characters of a name that the service takes


def group_of(folder: str) -> str | None:
    """Return the group of the images in a folder, None in the topmost one ("" or ".").

    folder: its path below the topmost one. A path that is no name to the service (1 to 128 printable
    characters without blanks at its ends) stands by its SHA-256, in hex.
    """
    if folder in ("", "."):
        return None
    if len(folder) <= _LONGEST and folder.isprintable() and folder == folder.strip():
        return folder
    return hashlib.sha256(os.fsencode(folder)).hexdigest()
