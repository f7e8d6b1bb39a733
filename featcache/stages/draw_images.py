"""Heads on a few training images: drawn several times, because which ones they are decides a lot."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from featcache.cache import FeatureCache
from featcache.config import HeadConfig
from featcache.errors import DatasetError
from featcache.heads import FittedHead, HeldOut, find_logits, fit_head
from featcache.heads.rows import gather
from featcache.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What several random draws of training images gave.

    Attributes
    ----------
    what
        What each draw is, in words.
    n_images
        Images in a draw.
    accuracies
        By split, one for each draw.
    """

    what: str
    n_images: int
    accuracies: dict[str, list[float]]

    def describe(self) -> dict[str, Any]:
        """As plain values (see docs/json.md)."""
        spread = {
            name: {"accuracies": values, "mean": float(np.mean(values)), "std": find_spread(values)}
            for name, values in self.accuracies.items()
        }
        return {"what": self.what, "images": self.n_images, **spread}

    def say(self) -> str:
        """In a sentence."""
        values = self.accuracies["val"]
        return (
            f"{self.what}, drawn {len(values)} times: validation accuracy {np.mean(values):.4f} on average, standard "
            f"deviation {find_spread(values):.4f}; the head and the numbers of this run are the first draw's"
        )


def find_spread(values: list[float]) -> float:
    """The sample standard deviation; 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def fit_draws(cache: FeatureCache, config: HeadConfig, progress: Progress) -> tuple[FittedHead, Draws]:
    """Fit a head on each draw, everything chosen within it; give the first one, and how all of them did.

    Raises
    ------
    DatasetError
        If a class has not as many images as are to be drawn of it.
    """
    train, first = cache.splits["train"], None
    labels, views = train.listing.labels, train.views if config.views else None
    accuracies: dict[str, list[float]] = {name: [] for name in cache.splits if name != "train"}
    images = np.empty(0, np.int64)
    for draw in progress.track(range(config.repeats), total=config.repeats, what="few images", unit="draw"):
        images = draw_images(labels, cache.classes, config, draw)
        val = cache.splits["val"]
        fitted = fit_head(
            gather(train.features, images),
            labels[images],
            len(cache.classes),
            replace(config, seed=config.seed + draw),
            views=None if views is None else gather(views, images),
            validation=HeldOut(features=val.features, labels=val.listing.labels) if config.select_on == "val" else None,
        )
        for name, values in accuracies.items():
            split = cache.splits[name]
            logits = find_logits(fitted.head, split.features)
            values.append(float(np.mean(logits.argmax(axis=1) == split.listing.labels)))
        first = first or fitted
    assert first is not None
    share = f"{config.shots} images of each class" if config.shots else f"{config.fraction:.3g} of the training images"
    return first, Draws(what=share, n_images=len(images), accuracies=accuracies)


def draw_images(
    labels: NDArray[np.int64], classes: tuple[str, ...], config: HeadConfig, draw: int
) -> NDArray[np.int64]:
    """Numbers of the images of a draw, in order: `shots` of each class, or a `fraction` of each, at least one."""
    rng = np.random.default_rng([config.seed, draw])
    chosen = []
    for label, name in enumerate(classes):
        mine = np.flatnonzero(labels == label)
        n = config.shots if config.shots is not None else max(1, round((config.fraction or 1.0) * len(mine)))
        if n > len(mine):
            raise DatasetError(f"--shots is {n}, and the class {name} has {len(mine)} training images; draw fewer")
        chosen.append(rng.choice(mine, n, replace=False))
    return np.sort(np.concatenate(chosen))
