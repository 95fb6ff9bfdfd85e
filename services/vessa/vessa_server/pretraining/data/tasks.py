"""Draw the episodes of Stage 1: a mix of real pools, synthetic studies and region tasks.

Synthetic studies are renewed while the training goes on, so that no anatomy is seen for long. Study
number `i` is the same in every run with the same seed, which makes a resumed run see the same ones.
"""

from collections.abc import Callable

import numpy as np
from rich.progress import track

from vessa_server.pretraining.data.pools import Episode, Pool, pool_of_study
from vessa_server.pretraining.data.regions import region_episode
from vessa_server.pretraining.data.synthetic import (
    CAVITY_NAMES,
    composite_study,
    phantom_study,
    random_study,
)
from vessa_server.pretraining.data.varied_studies import inset_study, varied_study

SHAPES = "shapes"  # name of the pools of random shapes, whose slices all show one layout
KINDS = ("varied", "inset", "composite", "heart", "abdomen", SHAPES)
_SHARES = (0.35, 0.15, 0.2, 0.08, 0.12, 0.1)
_PROTOCOLS = {"heart": ("cine MR", "cine MR", None), "abdomen": ("MR T2", "CT", None)}
MEMORY_SHARES = (0.5, 0.25, 0.25)  # of the batches have one, two and three templates in memory


class StudySource:
    """Makes synthetic study number 0, 1, ... of a run.

    real: pools whose slices composites and insets are made of; without any, random anatomies replace them
    """

    def __init__(self, seed: int, size: int, real: list[Pool]) -> None:
        self.seed, self.size, self.real = seed, size, real
        self._hearts = [
            (p, c) for p in real for c, n in p.classes.items() if n.lower().startswith(CAVITY_NAMES)
        ]

    def pool(self, index: int) -> Pool:
        """Make the pool of one study; the same index gives the same pool."""
        rng = np.random.default_rng([self.seed, index])
        while True:
            pool = self._pool(rng, str(rng.choice(KINDS, p=_SHARES)))
            if pool.classes:  # a study whose structures are all too small or large is drawn again
                return pool

    def _pool(self, rng: np.random.Generator, kind: str) -> Pool:
        if kind == SHAPES:
            return pool_of_study(random_study(rng, patients=6, size=self.size), SHAPES)
        if kind in _PROTOCOLS:
            protocol = _PROTOCOLS[kind][int(rng.integers(3))]
            study = phantom_study(kind, rng, protocol=protocol, patients=4, slices=5, size=self.size)
            return pool_of_study(study, kind)
        if kind == "composite" and self._hearts:
            pool, cavity = self._hearts[int(rng.integers(len(self._hearts)))]
            rows, groups = _some_slices(rng, pool, pool.showing[cavity], 5)
            return pool_of_study(
                composite_study(rng, pool.images[rows], pool.masks[rows] == cavity, groups), "heart"
            )
        if kind == "inset" and self.real:
            pool = self.real[int(rng.integers(len(self.real)))]
            rows, groups = _some_slices(rng, pool, np.arange(len(pool.images)), 4)
            return pool_of_study(inset_study(rng, pool.images[rows], groups), "inset")
        slices = int(rng.integers(1, 5))
        return pool_of_study(varied_study(rng, patients=6, slices=slices, size=self.size), "varied")


def _some_slices(
    rng: np.random.Generator, pool: Pool, rows: np.ndarray, each: int
) -> tuple[list[int], list[str]]:
    """Draw slices of up to five groups, `each` of a group at most: rows of the pool and group names."""
    groups = rng.permutation(np.unique(pool.group_of[rows]))[:5]
    chosen = [int(r) for g in groups for r in rng.permutation(rows[pool.group_of[rows] == g])[:each]]
    return chosen, [pool.group_names[pool.group_of[r]] for r in chosen]


class Tasks:
    """Draws batches of episodes.

    source, studies: synthetic studies held at a time; synthetic_share: of the episodes, from synthetic
    pools; region_share: of the real episodes, region tasks; redraw: batches until the template banks are
    drawn anew; renew: batches until the oldest study is replaced
    """

    def __init__(
        self,
        real: list[Pool],
        source: StudySource,
        studies: int,
        synthetic_share: float,
        region_share: float = 0.0,
        redraw: int = 200,
        renew: int = 8,
    ) -> None:
        self.real, self.source, self.studies = real, source, studies
        self.share, self.region_share = synthetic_share if real else 1.0, region_share
        self._redraw, self._renew = redraw, renew
        self.drawn = 0
        self._synthetic: list[Pool] | None = None

    @property
    def synthetic(self) -> list[Pool]:
        """The synthetic studies of the present state; made at the first use, which takes minutes."""
        if self._synthetic is None:
            renewed = self.drawn // self._renew
            newest = [self._newest(slot, renewed) for slot in range(self.studies)]
            shown = track(newest, "synthetic studies", transient=True)
            self._synthetic = [self.source.pool(index) for index in shown]
            self._redraw_banks()
        return self._synthetic

    @property
    def pools(self) -> list[Pool]:
        """All pools that episodes are drawn from at present."""
        return [*self.real, *self.synthetic]

    def restore(self, drawn: int) -> None:
        """Go to the state after `drawn` batches: the studies of then and their banks."""
        self.drawn, self._synthetic = drawn, None

    def _newest(self, slot: int, renewed: int) -> int:
        """Number of the study in a slot after `renewed` replacements, which go round the slots."""
        rounds = (renewed - slot + self.studies - 1) // self.studies
        return slot + self.studies * max(rounds, 0)

    def _redraw_banks(self) -> None:
        epoch = self.drawn // self._redraw
        for index, pool in enumerate(self.pools):
            pool.redraw_bank(np.random.default_rng([self.source.seed, epoch, index]))

    def describe(self, vectors: Callable[[np.ndarray], np.ndarray]) -> None:
        """Compute the retriever's vectors (N, D) of all images (N, S, S) uint8, for Eq. 1."""
        for pool in self.pools:
            pool.vectors = vectors(pool.images)

    def layouts(self, rng: np.random.Generator, count: int, kinds: int = 2) -> tuple[np.ndarray, np.ndarray]:
        """Draw `count` slices of each of `kinds` pools, one pool after the other: images and masks."""
        pools = [p for p in self.pools if p.classes]
        usable = [p for p in pools if p.name != SHAPES] or pools
        drawn = [usable[i].draw_layouts(rng, count) for i in rng.integers(len(usable), size=kinds)]
        images, masks = zip(*drawn, strict=True)
        return np.concatenate(images), np.concatenate(masks)

    def batch(self, rng: np.random.Generator, size: int) -> list[Episode]:
        """Draw `size` episodes, all with the same number of templates."""
        synthetic_pools = self.synthetic  # of the state before this batch
        self.drawn += 1
        if self.drawn % self._redraw == 0:
            self._redraw_banks()
        if self.studies and self.drawn % self._renew == 0:
            self._replace_oldest()
        templates = 1 + int(rng.choice(len(MEMORY_SHARES), p=MEMORY_SHARES))
        episodes: list[Episode] = []
        while len(episodes) < size:
            synthetic = rng.random() < self.share
            pools = synthetic_pools if synthetic else self.real
            pool = pools[int(rng.integers(len(pools)))]
            if not synthetic and rng.random() < self.region_share:
                image = pool.images[int(rng.integers(len(pool.images)))]
                episode = region_episode(image, rng, templates)
            else:
                episode = pool.draw(rng, templates) if pool.classes else None
            if episode is not None:
                episodes.append(episode)
        return episodes

    def _replace_oldest(self) -> None:
        renewed = self.drawn // self._renew
        slot = (renewed - 1) % self.studies
        pool = self.source.pool(self._newest(slot, renewed))
        epoch = self.drawn // self._redraw
        pool.redraw_bank(np.random.default_rng([self.source.seed, epoch, len(self.real) + slot]))
        self.synthetic[slot] = pool
