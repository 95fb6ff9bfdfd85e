"""Region tasks: superpixels of images that nobody annotated, as structures to follow.

A region of an image is followed from one augmented view of the image to another, as in SSL-ALPNet
(Ouyang et al., 2020). This brings the texture of real images to structures that no annotation marks.
"""

import numpy as np
from scipy import ndimage
from skimage.segmentation import felzenszwalb

from vessa_server.pretraining.data.pools import MIN_AREA, Episode

MAX_AREA = 0.15  # of the image; larger superpixels are mostly background
MAX_REGIONS = 3  # in one episode
_SCALES = (30.0, 100.0, 250.0)  # of Felzenszwalb's criterion: larger ones merge more
_LEAST = (0.002, 0.004, 0.01)  # share of the image that a superpixel takes up at least
_JOIN_SHARE, _FILL_SHARE = 0.25, 0.5


def region_episode(image: np.ndarray, rng: np.random.Generator, templates: int = 1) -> Episode | None:
    """Draw one to three superpixels of an image, uint8 (S, S), as classes.

    Returns None when no superpixel has a useful size and more than the background's intensity.
    """
    least = int(rng.choice(_LEAST) * image.size)
    scale = float(rng.choice(_SCALES))
    superpixels = felzenszwalb(image.astype(np.float32) / 255, scale=scale, sigma=0.8, min_size=least)
    ids, counts = np.unique(superpixels, return_counts=True)
    share, brightness = counts / image.size, ndimage.mean(image, superpixels, ids)
    usable = ids[(share > MIN_AREA) & (share < MAX_AREA) & (brightness > 0.15 * image.max())]
    if not len(usable):
        return None
    chosen = rng.choice(usable, min(len(usable), int(rng.integers(1, MAX_REGIONS + 1))), replace=False)
    mask = np.zeros(image.shape, np.uint8)
    for class_id, superpixel in enumerate(chosen, 1):
        region = superpixels == superpixel
        if rng.random() < _JOIN_SHARE:  # organs are often several superpixels
            around = np.unique(superpixels[ndimage.binary_dilation(region, iterations=2) & ~region])
            around = around[np.isin(around, usable)]
            if len(around):
                region |= superpixels == rng.choice(around)
        if rng.random() < _FILL_SHARE:
            region = ndimage.binary_fill_holes(region)
        mask[region & (mask == 0)] = class_id
    classes = {c: "structure" for c in range(1, len(chosen) + 1) if (mask == c).any()}
    return Episode((image,) * templates, (mask,) * templates, image, mask, classes)
