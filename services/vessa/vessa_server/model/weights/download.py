"""Download official weights from the Hugging Face hub and verify their checksums."""

import hashlib
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import HTTPError

from vessa.errors import InvalidRequest, InvalidWeights

HUB = "https://huggingface.co"


class OfficialFile(NamedTuple):
    """Location of a file on the hub, its sha256 and its licence."""

    repository: str
    file: str
    sha256: str
    license: str


def _sam(size: str, sha256: str) -> OfficialFile:
    return OfficialFile(
        f"facebook/sam2.1-hiera-{size.replace('_', '-')}", f"sam2.1_hiera_{size}.pt", sha256, "Apache-2.0"
    )


# Files with a confirmed checksum. Others are downloaded by hand, and `weights build` records the checksum
# that it was given.
OFFICIAL = {
    "sam2.1-tiny": _sam("tiny", "7402e0d864fa82708a20fbd15bc84245c2f26dff0eb43a4b5b93452deb34be69"),
    "sam2.1-small": _sam("small", "6d1aa6f30de5c92224f8172114de081d104bbd23dd9dc5c58996f0cad5dc4d38"),
    "sam2.1-base-plus": _sam("base_plus", "a2345aede8715ab1d5d31b4a509fb160c5a4af1970f199d9054ccfb746c004c5"),
    "sam2.1-large": _sam("large", "2647878d5dfa5098f2f8649825738a9345572bae2d4350a2468587ece47dd318"),
}
_BY_HAND = {
    "dinov2-small": "timm/vit_small_patch14_dinov2.lvd142m",
    "dinov2-base": "timm/vit_base_patch14_dinov2.lvd142m",
    "qwen3-vl-2b": "Qwen/Qwen3-VL-2B-Instruct",
    "qwen3-vl-4b": "Qwen/Qwen3-VL-4B-Instruct",
    "qwen3-vl-8b": "Qwen/Qwen3-VL-8B-Instruct",
}


def fetch(name: str, folder: Path) -> Path:
    """Download an official file into a folder, or check the one that is there; return its path.

    Raises InvalidRequest for an unknown name, InvalidWeights when the hub cannot be reached or the checksum
    differs.
    """
    if name in _BY_HAND:
        raise InvalidRequest(
            f"no checksum of {name} is known to this version: download {HUB}/{_BY_HAND[name]} by hand "
            "and give it to `vessa-server weights build`"
        )
    if name not in OFFICIAL:
        raise InvalidRequest(f"unknown name '{name}'; known are {', '.join([*OFFICIAL, *_BY_HAND])}")
    wanted = OFFICIAL[name]
    path = folder / wanted.file
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        try:
            get_hf_file_metadata(hf_hub_url(wanted.repository, wanted.file))  # one attempt, without retries
            hf_hub_download(wanted.repository, wanted.file, local_dir=folder)
        except (OSError, HTTPError) as error:
            raise InvalidWeights(
                f"the hub cannot be reached ({type(error).__name__}): download "
                f"{HUB}/{wanted.repository}/resolve/main/{wanted.file} by hand, put it at {path} and repeat "
                "this command to check it"
            ) from error
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wanted.sha256:
        raise InvalidWeights(
            f"{path} is not the official file: sha256 {found}, expected {wanted.sha256}; remove it and repeat"
        )
    return path
