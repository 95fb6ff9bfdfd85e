"""Where Stage 1's template-target pairs come from.

A pool holds one data set's or study's slices as squares. Templates come from a bank of 5 % of its
groups (paper section 3.1), redrawn now and then; targets from the other groups, so that a template
and its target are never of the same patient. Among the bank's slices that show the class one is
drawn by Eq. 1, or at random, because a lab's bank of one patient holds bad matches too.

Region tasks need no annotation: a region of a real image, found by its intensities, is followed from
one augmented view of that image to another. They bring the texture of real images, which synthetic
ones lack, to structures that no annotation of ours marks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from vessa.datasets import Dataset
from vessa_server.model.geometry import Square, resize, to_tensor
from vessa_server.pretraining.data.synthetic import (
    CAVITY_NAMES,
    Study,
    composite_study,
    phantom_study,
    random_study,
)

MIN_AREA = 0.0015  # of the square; a structure of fewer pixels teaches nothing at the network's size
BANK_SHARE = 0.05
POOL_SCALE = 1.5  # pools are finer than what the network sees, so that a second look finds more
POOL_LIMIT = 512  # px; few medical slices are finer, and all of them are held in memory
CLASSES_A_PAIR = 2  # the image encoder costs most: what it says is used twice
TAU = 0.1
SHAPES = "shapes"  # name of the pools of random shapes, whose slices all show one layout


@dataclass(frozen=True)
class Pair:
    """Two images and what to draw: each of `classes` in the target as the template shows it.

    images uint8 (S, S), masks uint8 (S, S) with class ids; classes: id to name
    """

    template: np.ndarray
    template_mask: np.ndarray
    target: np.ndarray
    target_mask: np.ndarray
    classes: dict[int, str]


class Pool:
    """Slices of one data set or study.

    images, masks: (N, S, S) uint8; groups: N names; classes: id to name
    """

    def __init__(
        self, name: str, images: np.ndarray, masks: np.ndarray, groups: Sequence[str], classes: dict[int, str]
    ) -> None:
        self.name = name
        self.images, self.masks = images, masks
        names, self.group_of = np.unique(np.asarray(groups), return_inverse=True)
        self.group_names = [str(n) for n in names]
        area = {c: (masks == c).mean((1, 2)) for c in classes}
        self.showing = {c: np.flatnonzero((a > MIN_AREA) & (a < 0.4)) for c, a in area.items()}
        self.classes = {
            c: n for c, n in classes.items() if len(np.unique(self.group_of[self.showing[c]])) >= 2
        }
        small = resize(torch.from_numpy(images[:, None]).float(), (16, 16)).flatten(1)
        small = small - small.mean(1, keepdim=True)
        self.thumbnails = (small / (small.norm(dim=1, keepdim=True) + 1e-6)).numpy()
        self.bank: np.ndarray = np.array([], dtype=int)

    def redraw_bank(self, rng: np.random.Generator) -> None:
        """Draw the groups whose slices serve as templates until the next call."""
        count = max(1, round(BANK_SHARE * len(self.group_names)))
        self.bank = rng.choice(len(self.group_names), count, replace=False)

    def draw(self, rng: np.random.Generator) -> Pair | None:
        """Draw one pair of at most `CLASSES_A_PAIR` classes; None when the bank shows none to be drawn."""
        class_id = int(rng.choice(list(self.classes)))
        showing = self.showing[class_id]
        in_bank = np.isin(self.group_of[showing], self.bank)
        templates, others = showing[in_bank], showing[~in_bank]
        if not len(templates) or not len(others):
            return None
        target = int(rng.choice(others))
        if rng.random() < 0.12:  # the structure may be absent: the network must be able to say so
            target = int(rng.choice(np.flatnonzero(~np.isin(self.group_of, self.bank))))
        template = int(rng.choice(templates))
        if rng.random() < 0.5:
            similarity = self.thumbnails[templates] @ self.thumbnails[target]
            best = np.argsort(similarity)[::-1][:3]
            weights = np.exp((similarity[best] - similarity[best[0]]) / TAU)
            template = int(templates[rng.choice(best, p=weights / weights.sum())])
        shown = [c for c in self.classes if c != class_id and template in self.showing[c]]
        further = rng.permutation(shown)[: CLASSES_A_PAIR - 1].tolist()
        return Pair(
            self.images[template],
            self.masks[template],
            self.images[target],
            self.masks[target],
            {c: self.classes[c] for c in (class_id, *further)},
        )

    def draw_layouts(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw slices that show a class: images (count, S, S) uint8 and masks of the pool's classes."""
        showing = np.unique(np.concatenate([self.showing[c] for c in self.classes]))
        rows = rng.choice(showing, count, replace=len(showing) < count)
        masks = self.masks[rows]
        return self.images[rows], np.where(np.isin(masks, list(self.classes)), masks, 0)

    def draw_region(self, rng: np.random.Generator) -> Pair | None:
        """Draw a region and the ring around it in one image; None when the region is too small or large."""
        image = self.images[int(rng.integers(len(self.images)))]
        smooth = ndimage.gaussian_filter(image.astype(np.float32), rng.uniform(0.8, 2.5))
        seed = tuple(int(v) for v in rng.integers(image.shape[0], size=2))
        width = rng.uniform(0.25, 0.8) * smooth.std()
        band = ndimage.binary_opening(np.abs(smooth - smooth[seed]) < width, iterations=2)  # cuts leaks
        labeled, _ = ndimage.label(band)
        region = ndimage.binary_fill_holes(labeled == labeled[seed])
        if not band[seed] or not MIN_AREA < region.mean() < 0.08 or smooth[seed] < 0.25 * smooth.mean():
            return None
        ring = ndimage.binary_dilation(region, iterations=int(rng.integers(2, 7))) & ~region
        mask = (region + 2 * ring).astype(np.uint8)
        return Pair(image, mask, image, mask, {1: "structure", 2: "structure"})


def pool_of_study(study: Study, name: str) -> Pool:
    """Make a pool of a synthetic study."""
    return Pool(name, np.stack(study.images), np.stack(study.masks), study.groups, study.classes)


def pool_size(image_size: int) -> int:
    """Side of a pool's squares in px, for a network that sees `image_size` px."""
    return min(POOL_LIMIT, int(POOL_SCALE * image_size))


def squares_of(image: np.ndarray, mask: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Make an image, uint8 (H, W[, 3]), gray, and it and its mask, uint8 (H, W), squares of `size` px."""
    square = Square(*mask.shape)
    gray = (square.enter(to_tensor(image), size).mean(1)[0] * 255).round()
    label: Tensor = torch.from_numpy(mask.astype(np.float32))[None, None]
    label = square.enter(label, size, "nearest-exact")[0, 0]
    return gray.byte().numpy(), label.byte().numpy()


def pool_of_dataset(dataset: Dataset, groups: Sequence[str], size: int) -> Pool:
    """Make a pool of some groups of a data set; color becomes gray, images become squares of `size` px."""
    wanted = set(groups)
    images, masks, names = [], [], []
    for item in dataset.slices():
        if item.group not in wanted:
            continue
        mask = dataset.mask(item)
        if mask is None:
            continue
        image, label = squares_of(dataset.image(item), mask, size)
        images.append(image)
        masks.append(label)
        names.append(item.group)
    return Pool(dataset.name, np.stack(images), np.stack(masks), names, dict(dataset.classes))


def synthetic_pools(seed: int, count: int, size: int) -> list[Pool]:
    """Draw `count` synthetic studies: half random shapes, a quarter each heart and abdomen phantoms."""
    pools = []
    for index in range(count):
        rng = np.random.default_rng([seed, index])
        if index % 2:
            pools.append(pool_of_study(random_study(rng, patients=6, size=size), SHAPES))
            continue
        kind = "heart" if index % 4 else "abdomen"
        protocols = {"heart": ("cine MR", "cine MR", None), "abdomen": ("MR T2", "CT", None)}[kind]
        study = phantom_study(
            kind, rng, protocol=protocols[(index // 4) % 3], patients=4, slices=5, size=size
        )
        pools.append(pool_of_study(study, kind))
    return pools


def composite_pools(real: list[Pool], seed: int, count: int) -> list[Pool]:
    """Set phantom hearts into real slices with an annotated left ventricle; none where no pool has one."""
    hearts = [(p, c) for p in real for c, name in p.classes.items() if name.lower().startswith(CAVITY_NAMES)]
    pools = []
    for index in range(count if hearts else 0):
        rng = np.random.default_rng([seed, 1_000_000 + index])
        pool, cavity = hearts[index % len(hearts)]
        showing = pool.showing[cavity]
        patients = rng.permutation(np.unique(pool.group_of[showing]))[:5]
        rows = [r for p in patients for r in rng.permutation(showing[pool.group_of[showing] == p])[:5]]
        names = [pool.group_names[pool.group_of[r]] for r in rows]
        study = composite_study(rng, pool.images[rows], pool.masks[rows] == cavity, names)
        pools.append(pool_of_study(study, "heart"))
    return pools


class Tasks:
    """Draws batches of pairs.

    synthetic_share: of the pairs, from synthetic pools; region_share: of the real pairs, region tasks
    """

    def __init__(
        self,
        real: list[Pool],
        synthetic: list[Pool],
        synthetic_share: float,
        region_share: float = 0.0,
        redraw: int = 200,
    ) -> None:
        self.real, self.synthetic = real, synthetic
        self.share, self.region_share = synthetic_share if real else 1.0, region_share
        self.redraw = redraw
        self.drawn = 0

    def layouts(self, rng: np.random.Generator, count: int, kinds: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """Draw `count` slices of each of `kinds` pools, one pool after the other: images and masks."""
        pools = [p for p in [*self.real, *self.synthetic] if p.classes]
        usable = [p for p in pools if p.name != SHAPES] or pools
        drawn = [usable[i].draw_layouts(rng, count) for i in rng.integers(len(usable), size=kinds)]
        images, masks = zip(*drawn, strict=True)
        return np.concatenate(images), np.concatenate(masks)

    def batch(self, rng: np.random.Generator, size: int) -> list[Pair]:
        """Draw `size` pairs."""
        if self.drawn % self.redraw == 0:
            for pool in [*self.real, *self.synthetic]:
                pool.redraw_bank(rng)
        self.drawn += 1
        pairs: list[Pair] = []
        while len(pairs) < size:
            synthetic = rng.random() < self.share
            pools = self.synthetic if synthetic else self.real
            pool = pools[int(rng.integers(len(pools)))]
            if not synthetic and rng.random() < self.region_share:
                pair = pool.draw_region(rng)
            else:
                pair = pool.draw(rng) if pool.classes else None
            if pair is not None:
                pairs.append(pair)
        return pairs
