"""A query image and its classes on their way through inference."""

from collections.abc import Hashable
from dataclasses import dataclass

from vessa_server.inference.calibration import Calibration
from vessa_server.inference.image_views import FirstPass, ImageView
from vessa_server.model.prompt_encoding import MaskPrompts
from vessa_server.template_bank.retrieval import Bank
from vessa_server.template_bank.template import Template, View
from vessa_server.types import SegmentItem


@dataclass
class Query:
    """One item with its bank and the views of its image.

    whole: the view of the whole image; zoomed: the view of its region of interest, once that is known
    calibration: of the bank, by which masks are fused
    """

    item: SegmentItem
    bank: Bank
    whole: ImageView
    zoomed: ImageView | None = None
    calibration: Calibration = Calibration()

    @property
    def view(self) -> ImageView:
        """The closest view there is, on which masks are predicted."""
        return self.zoomed or self.whole

    @property
    def first_pass_key(self) -> Hashable:
        """Everything that a first pass depends on, besides the image."""
        item = self.item
        return self.bank.name, self.bank.digest, item.group, item.template_choice, item.seed

    @property
    def first_pass(self) -> FirstPass | None:
        """The first pass over the whole image, None before it was made."""
        return self.whole.first_passes.get(self.first_pass_key)


@dataclass
class ClassQuery:
    """One class of one query: a mask to predict.

    matches: its templates with their similarity, most similar first; prompts: the caller's, in native px
    """

    view: ImageView
    class_id: int
    class_name: str
    matches: list[tuple[Template, float]]
    prompts: MaskPrompts

    @property
    def key(self) -> Hashable:
        """Everything that the conditioned features depend on, besides the image."""
        return self.class_id, self.class_name, tuple(t.id for t, _ in self.matches)

    @property
    def template_views(self) -> list[View]:
        """The view of each template that is magnified like the query's: whole or zoomed."""
        zoomed = self.view.square.window is not None
        return [(t.close if zoomed and t.close else t.whole) for t, _ in self.matches]
