"""Read request bodies into checked items for the worker."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vessa.codec import TensorSpec, decode, image_digest
from vessa.errors import (
    InvalidImage,
    InvalidPrompt,
    InvalidRequest,
    MalformedBody,
    NoTemplate,
    ShapeMismatch,
    TooLarge,
    UnknownClass,
    UnknownImage,
    VessaError,
)
from vessa.volumes import Volume, check_dicom_seg
from vessa_server.serialization.fields import (
    MIN_SIDE,
    check_known,
    check_size,
    item_seed,
    json_metadata,
    read_classes,
    read_group,
    read_options,
    read_per_class,
    read_strings,
    read_switch,
)
from vessa_server.serialization.image_files import decode_dicom, decode_image, decode_mask
from vessa_server.serialization.multipart import Form
from vessa_server.serialization.prompt_arrays import PromptArrays
from vessa_server.serialization.seen_sizes import SeenSizes
from vessa_server.settings import Settings
from vessa_server.template_bank.bank import TemplateBanks
from vessa_server.template_bank.permissions import CallersBanks
from vessa_server.template_bank.retrieval import Bank, check_name
from vessa_server.types import SegmentItem, TemplateItem, scoped_id

DEFAULT_BANK = "default"
_IMAGES = TensorSpec(("U8",), ((None, None, None), (None, None, None, 3)))
TEMPLATE_TENSORS = {"images": _IMAGES, "masks": TensorSpec(("U8",), ((None, None, None),))}
SEGMENT_TENSORS = {
    "images": _IMAGES,
    "boxes": TensorSpec(("F32",), ((None, None, 4),)),
    "points": TensorSpec(("F32",), ((None, None, None, 2),)),
    "point_labels": TensorSpec(("I8",), ((None, None, None),)),
    "mask_logits": TensorSpec(("F16", "F32"), ((None, None, None, None),)),
    "mask_present": TensorSpec(("U8",), ((None, None),)),
}
TEMPLATE_FIELDS = {"image", "mask", "classes", "group", "bank"}
SEGMENT_FIELDS = {
    "image", "bank", "classes", "group", "boxes", "points", "point_labels", "template_choice", "seed",
    "clean",
}  # fmt: skip


@dataclass(frozen=True)
class TemplateRequest:
    """Hold annotated examples for one bank. notes: what was repaired in a file, one sentence each."""

    bank: str
    items: list[TemplateItem]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SegmentRequest:
    """Hold query images for one bank. An invalid item is represented by its error; the others are computed.

    ids: of all images
    classes: {id: name} in the order of the request
    size: (H, W) of the images, px; None without a usable image
    seed: random seed of the request; each item derives its own from it
    clean: whether labels are cleaned, see `serving.label_cleaning`
    notes: what was repaired in the file of a form, one sentence each
    volume: the DICOM image of a form whose answer is a DICOM SEG
    """

    bank: Bank
    ids: tuple[str, ...]
    items: list[SegmentItem | VessaError]
    classes: dict[int, str]
    size: tuple[int, int] | None
    probabilities: bool
    seed: int = 0
    clean: bool = False
    notes: tuple[str, ...] = ()
    volume: Volume | None = None


@dataclass(frozen=True)
class Reader:
    """Parse request bodies. Runs in a thread of the pool.

    holds: returns whether the worker still caches the features of an image, by its scoped id
    client: name of the key that sends the requests, see `types.scoped_id`
    """

    settings: Settings
    banks: TemplateBanks | CallersBanks
    sizes: SeenSizes
    holds: Callable[[str], bool]
    client: str = ""

    def for_caller(self, banks: CallersBanks) -> "Reader":
        """Return a reader for the requests of one caller."""
        return replace(self, banks=banks, client=banks.caller.name)

    def template_form(self, content_type: str, body: bytes) -> TemplateRequest:
        """Parse a multipart POST /templates: one annotated image."""
        form = Form(content_type, body, TEMPLATE_FIELDS)
        bank = check_name(form.text("bank", DEFAULT_BANK))
        classes = read_classes(form.json("classes"))
        group = read_group(form.text("group", ""), "group")
        notes: list[str] = []
        image = decode_image(form.file("image"), self.settings.limits.max_pixels, notes)
        mask = decode_mask(form.file("mask"), image.shape[:2], self.settings.limits.max_pixels, classes)
        return replace(
            self._template_request(bank, image[None], mask[None], classes, [group]), notes=tuple(notes)
        )

    def template_tensors(self, body: bytes) -> TemplateRequest:
        """Parse a safetensors POST /templates: many annotated images of one size."""
        tensors, metadata = decode(body, TEMPLATE_TENSORS, max_bytes=self.settings.limits.max_body_bytes)
        check_known(metadata, {"bank", "classes", "groups"})
        if tensors.keys() != TEMPLATE_TENSORS.keys():
            raise MalformedBody(f"The body needs the tensors images and masks, got {sorted(tensors)}.")
        images, masks = tensors["images"], tensors["masks"]
        self._check_images(images)
        if images.shape[:3] != masks.shape:
            raise ShapeMismatch(
                f"Masks need the count and size of the images, {images.shape[:3]}, got {masks.shape}."
            )
        bank = check_name(metadata.get("bank", DEFAULT_BANK))
        classes = read_classes(json_metadata(metadata, "classes"))
        groups = read_strings(json_metadata(metadata, "groups"), "groups", len(images))
        return self._template_request(bank, images, masks, classes, [read_group(g, "groups") for g in groups])

    def _template_request(
        self, bank: str, images: NDArray[Any], masks: NDArray[Any], classes: dict[int, str], groups: list[str]
    ) -> TemplateRequest:
        check_size(images.shape[1:3], len(classes), self.settings.limits.max_pixels)
        items = []
        for i, (image, mask, group) in enumerate(zip(images, masks, groups, strict=True)):
            ids = [int(value) for value in np.unique(mask) if value]
            unknown = [value for value in ids if value not in classes]
            if unknown:
                raise UnknownClass(
                    f"The mask of image {i} has the class ids {ids}, but `classes` names only "
                    f"{sorted(classes)}. Add {unknown} to `classes`.",
                    item=i,
                )
            if not ids:
                raise InvalidImage(
                    f"The mask of image {i} is empty. A template needs at least one pixel of a class.", item=i
                )
            items.append(TemplateItem(image, mask, {value: classes[value] for value in ids}, group))
        return TemplateRequest(bank, items)

    def segment_form(self, content_type: str, body: bytes, *, dicom_seg: bool = False) -> SegmentRequest:
        """Parse a multipart POST /segment: one image. Raises VessaError for invalid input.

        dicom_seg: the answer is a DICOM SEG, so the image must be a DICOM file that one can refer to
        """
        form = Form(content_type, body, SEGMENT_FIELDS)
        options = {
            "template_choice": form.text("template_choice", "top1"),
            "seed": form.text("seed", "0"),
            "clean": form.text("clean", "0"),
        }
        notes: list[str] = []
        volume = None
        if dicom_seg:
            volume = decode_dicom(form.file("image"), self.settings.limits.max_pixels)
            check_dicom_seg(volume)  # before anything is computed
            image, notes = volume.image(2, 0), list(volume.notes)
        else:
            image = decode_image(form.file("image"), self.settings.limits.max_pixels, notes)
        prompts = {name: form.json(name) for name in ("boxes", "points", "point_labels")}
        group = form.text("group", "") or None
        request = self.segment_image(
            image, form.text("bank", DEFAULT_BANK), form.json("classes"), group, prompts, options
        )
        return replace(request, notes=tuple(notes), volume=volume)

    def segment_image(
        self,
        image: NDArray[np.uint8],
        bank_name: str,
        wanted: Any,
        group: str | None,
        drawn: Mapping[str, Any],
        options: Mapping[str, str],
    ) -> SegmentRequest:
        """Return the request of one image. Raises VessaError for invalid input.

        image: uint8 (H, W[, 3])
        wanted: class names, None for all of the bank
        drawn: boxes, points and point_labels by class name, as a form has them
        """
        bank, classes = self._classes(bank_name, wanted)
        most = self.settings.limits.max_points
        labels = drawn.get("point_labels")
        prompts = PromptArrays(
            boxes=read_per_class(drawn.get("boxes"), classes, "boxes", np.float32, (4,)),
            points=read_per_class(drawn.get("points"), classes, "points", np.float32, (None, 2), most),
            point_labels=read_per_class(labels, classes, "point_labels", np.int8, (None,), most),
        )
        _check_labeled(prompts)
        request = self._segment_request(bank, classes, image[None], None, [group], prompts, options)
        if isinstance(request.items[0], VessaError):
            raise request.items[0]
        return request

    def segment_prompted(
        self,
        image: NDArray[np.uint8],
        bank_name: str,
        wanted: list[str] | None,
        prompts: PromptArrays,
        group: str | None,
    ) -> SegmentRequest:
        """Return the request of one image with prompts of its classes. Raises what is wrong with it.

        image: uint8 (H, W[, 3]); wanted: class names, None = all of the bank; prompts: of B = 1 image
        """
        bank, classes = self._classes(bank_name, wanted)
        request = self._segment_request(bank, classes, image[None], None, [group], prompts, {})
        if isinstance(request.items[0], VessaError):
            raise request.items[0]
        return request

    def segment_tensors(self, body: bytes) -> SegmentRequest:
        """Parse a safetensors POST /segment: many images of one size, or their ids."""
        tensors, metadata = decode(body, SEGMENT_TENSORS, max_bytes=self.settings.limits.max_body_bytes)
        known = {
            "bank",
            "classes",
            "groups",
            "image_ids",
            "probabilities",
            "template_choice",
            "seed",
            "clean",
        }
        check_known(metadata, known)
        images = tensors.pop("images", None)
        ids = json_metadata(metadata, "image_ids") if "image_ids" in metadata else None
        if (images is None) == (ids is None):
            raise MalformedBody(
                "The body needs either the tensor images or the metadata image_ids, and not both."
            )
        if images is not None:
            self._check_images(images)
        else:
            ids = read_strings(ids, "image_ids", None)
            self._check_count(len(ids))
        count = len(images) if images is not None else len(ids or [])
        wanted = json_metadata(metadata, "classes") if "classes" in metadata else None
        groups: list[str | None] = [None] * count
        if "groups" in metadata:
            groups = read_strings(json_metadata(metadata, "groups"), "groups", count, optional=True)
        bank, classes = self._classes(metadata.get("bank", DEFAULT_BANK), wanted)
        return self._segment_request(bank, classes, images, ids, groups, PromptArrays(**tensors), metadata)

    def segment_slices(
        self, bank_name: str, wanted: list[str] | None, images: NDArray[np.uint8], group: str | None
    ) -> SegmentRequest:
        """Return the request of slices of a volume.

        images: uint8 (B, H, W[, 3]); wanted: class names, None = all of the bank
        """
        self._check_images(images)
        bank, classes = self._classes(bank_name, wanted)
        return self._segment_request(bank, classes, images, None, [group] * len(images), PromptArrays(), {})

    def _segment_request(
        self,
        bank: Bank,
        classes: dict[int, str],
        images: NDArray[Any] | None,
        image_ids: list[str] | None,
        groups: list[str | None],
        prompts: PromptArrays,
        options: Mapping[str, str],
    ) -> SegmentRequest:
        choice, seed, probabilities = read_options(options)
        clean = read_switch(options, "clean")
        prompts.check_shapes(len(groups), len(classes), self.settings.limits.max_points)
        if images is not None:
            ids = tuple(image_digest(image) for image in images)
            for identity in ids:
                self.sizes.add(scoped_id(self.client, identity), images.shape[1:3])
            sizes: list[tuple[int, int] | None] = [images.shape[1:3]] * len(ids)
        else:
            ids = tuple(image_ids or ())
            held = [scoped_id(self.client, identity) for identity in ids]
            sizes = [self.sizes.get(identity) if self.holds(identity) else None for identity in held]
        size = _common_size(sizes)
        check_size(size or (MIN_SIDE, MIN_SIDE), len(classes), self.settings.limits.max_pixels)
        self._check_answer(len(ids), len(classes), size, probabilities)
        names = tuple(classes.values())
        items: list[SegmentItem | VessaError] = []
        for i, identity in enumerate(ids):
            own_size = sizes[i]
            try:
                if own_size is None:
                    raise UnknownImage(
                        f"The service holds no image {identity[:80]!r} of this key. Send its pixels.", item=i
                    )
                drawn = prompts.item(i, own_size, names)
            except VessaError as error:
                items.append(error)
                continue
            pixels = None if images is None else images[i]
            items.append(
                SegmentItem(
                    scoped_id(self.client, identity),
                    pixels,
                    bank.name,
                    names,
                    groups[i],
                    **drawn,
                    template_choice=choice,
                    seed=item_seed(seed, identity),
                    probabilities=probabilities,
                )
            )
        return SegmentRequest(bank, ids, items, classes, size, probabilities, seed, clean)

    def _classes(self, bank_name: str, wanted: Any) -> tuple[Bank, dict[int, str]]:
        """Return the bank and the requested classes {id: name} in the request's order, None = all."""
        bank = self.banks.get(bank_name)
        if not bank.classes:
            raise NoTemplate(f"Bank {bank.name!r} has no template. Add one by POST /templates.")
        if wanted is None:
            return bank, bank.classes
        ids = {name: key for key, name in bank.classes.items()}
        names = read_strings(wanted, "classes", None)
        if not names or len(set(names)) != len(names):
            raise InvalidRequest("`classes` must be a list of one or more different names.")
        for name in names:
            if name not in ids:
                raise UnknownClass(f"Bank {bank.name!r} has no class {name[:80]!r}. It has {sorted(ids)}.")
        return bank, {ids[name]: name for name in names}

    def _check_images(self, images: NDArray[Any]) -> None:
        self._check_count(len(images))
        check_size(images.shape[1:3], 1, self.settings.limits.max_pixels)

    def _check_count(self, count: int) -> None:
        if not count:
            raise InvalidRequest("The request has no image. Send at least one.")
        if count > self.settings.limits.max_items:
            raise TooLarge(f"A request takes at most {self.settings.limits.max_items} images, got {count}.")

    def _check_answer(
        self, items: int, classes: int, size: tuple[int, int] | None, probabilities: bool
    ) -> None:
        height, width = size or (1, 1)
        answer = items * height * width * (2 + 2 * (classes + 1) * probabilities)
        if answer > self.settings.limits.max_answer_bytes:
            raise TooLarge(
                f"The answer would take {answer} bytes, more than the limit of "
                f"{self.settings.limits.max_answer_bytes}. Send fewer images in one request, or request no "
                "probabilities."
            )


def _check_labeled(prompts: PromptArrays) -> None:
    """Refuse a form's point without a label: padding would silently drop it."""
    points, labels = prompts.points, prompts.point_labels
    if points is None or labels is None or points.shape[:3] != labels.shape:
        return  # PromptArrays.check_shapes says so
    if ((points != -1).any(axis=-1) & (labels == -1)).any():
        raise InvalidPrompt("Each point needs a point label: 1 inside its class, 0 outside.")


def _common_size(sizes: list[tuple[int, int] | None]) -> tuple[int, int] | None:
    known = {size for size in sizes if size is not None}
    if len(known) > 1:
        raise ShapeMismatch(f"All images of a request need one size, got {sorted(known)} (height, width).")
    return known.pop() if known else None
