"""First pass: locate the bank's classes on the whole image, without prompts (beyond the paper).

Its masks are coarse. They say where the region of interest is, and how large each class is, which helps the
retrieval to find templates of a similar layout.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from vessa.masks.geometry import box_of
from vessa_server.inference.image_views import FirstPass
from vessa_server.inference.mask_prediction import MaskPredictor
from vessa_server.inference.query import ClassQuery, Query
from vessa_server.inference.region_of_interest import union
from vessa_server.inference.retrieval import first_pass_queries
from vessa_server.model.geometry import Square

SPECK = 0.1  # pieces below this share of a class's largest piece do not widen the box


def run_first_pass(queries: Sequence[Query], predictor: MaskPredictor) -> None:
    """Store a first pass with the image of each query that has none yet; equal ones are computed once."""
    missing: dict[tuple[str, Hashable], list[ClassQuery]] = {}
    for query in queries:
        key = (query.item.image_id, query.first_pass_key)
        if query.first_pass is None and key not in missing:
            missing[key] = first_pass_queries(query)
    masks = iter(predictor.predict([one for some in missing.values() for one in some]))
    for query in queries:
        some = missing.pop((query.item.image_id, query.first_pass_key), None)
        if some is None:
            continue
        logits = [next(masks)[0] for _ in some]
        result = FirstPass(None, {})
        if logits:
            result = read_first_pass(torch.cat(logits), [c.class_id for c in some], query.whole.square)
        query.whole.first_passes[query.first_pass_key] = result


def read_first_pass(logits: Tensor, class_ids: Sequence[int], square: Square) -> FirstPass:
    """Turn the mask logits of a first pass into a box and areas.

    logits: (K, 1, s, s) on the square, of the classes in `class_ids`
    """
    fused = torch.cat([torch.zeros_like(logits[:1]), logits])[:, 0].argmax(0).cpu().numpy()
    scale, shown = square.side / logits.shape[-1], square.shown
    boxes, areas = [], {}
    for row, class_id in enumerate(class_ids, 1):
        pieces, count = ndimage.label(fused == row)
        areas[class_id] = 0.0
        if count:
            sizes = np.bincount(pieces.ravel())[1:]
            areas[class_id] = float(sizes.sum()) * scale**2
            boxes.append(box_of(np.isin(pieces, 1 + np.flatnonzero(sizes >= SPECK * sizes.max()))))
    box = union(boxes)
    if box is None:
        return FirstPass(None, areas)
    x0, y0, x1, y1 = (scale * v for v in box)
    return FirstPass((x0 + shown.left, y0 + shown.top, x1 + shown.left, y1 + shown.top), areas)
