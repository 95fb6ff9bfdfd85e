"""Write the accepted labels of a worklist's volumes as NIfTI or DICOM SEG, on the grid of their files.

Slices that nobody accepted are background in them, and pictures have no grid; `export.json` counts both.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from vessa.errors import InvalidRequest, VessaError
from vessa.volumes import Bounds, write_labels
from vessa_server.worklists.records import StoredVolume, Worklist
from vessa_server.worklists.store import WorklistStore
from vessa_server.worklists.volumes import accepted_labels, read_source, slices_of, volumes_of

_UNSAFE = str.maketrans({c: "-" for c in '/\\:*?"<>| \t\n\r'})


class VolumeExport:
    """The label volumes of one export. counts: what each file holds, or why it is missing."""

    def __init__(
        self, store: WorklistStore, worklist: Worklist, classes: Mapping[int, str], kind: str, bounds: Bounds
    ) -> None:
        """Choose the volumes. Raises InvalidRequest where none fits, or none has an accepted slice."""
        self._store, self._worklist, self._bounds = store, worklist, bounds
        self._classes, self._kind = dict(classes), kind
        self.counts: dict[str, dict[str, Any]] = {}
        known = volumes_of(store, worklist)
        fitting = [volume for volume in known if volume.dicom or kind == "nifti"]
        if not fitting:
            raise InvalidRequest(
                f"worklist {worklist.name!r} has {len(known)} volumes, none of them gray DICOM, which a "
                "DICOM SEG refers to; export NIfTI or a data folder"
                if known
                else f"worklist {worklist.name!r} has pictures only, which have no grid; export a data folder"
            )
        self._volumes = [volume for volume in fitting if self._accepted(volume)]
        if not self._volumes:
            raise InvalidRequest(
                f"no slice of a volume of worklist {worklist.name!r} is accepted; review it first"
            )

    def files(self) -> Iterator[tuple[str, bytes | str]]:
        """Yield the name and the bytes of each file. A volume that cannot be read is named in `counts`."""
        suffix = ".nii.gz" if self._kind == "nifti" else ".dcm"
        for volume in self._volumes:
            stem = volume.name.removesuffix(".gz").rsplit(".", 1)[0].translate(_UNSAFE)[:80] or "volume"
            name, number = f"{stem}{suffix}", 1
            while name in self.counts:
                number += 1
                name = f"{stem}-{number}{suffix}"
            try:
                labels, accepted = accepted_labels(self._store, self._worklist, volume)
                source = read_source(self._store, self._worklist, volume, self._bounds)
                made_by = f"worklist {self._worklist.name}"
                data = write_labels(source, labels, self._classes, made_by, self._kind)
            except VessaError as error:
                self.counts[name] = {"left_out": str(error)}
                continue
            self.counts[name] = {"slices": volume.slices, "accepted": accepted}
            yield name, data

    def _accepted(self, volume: StoredVolume) -> bool:
        slices = slices_of(self._store, self._worklist, volume)
        return any(item.decision == "accepted" for item in slices)
