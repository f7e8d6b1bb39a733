"""Which images train and which validate, decided by their contents."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.listing import Split
from featcache.errors import DatasetError, shorten
from featcache.files import hash_bytes


def is_validation(digest: str, val_fraction: float, seed: int) -> bool:
    """Whether an image belongs to the validation split, from its content alone.

    The digest and the seed are hashed to a number in [0, 1); below `val_fraction` is validation. No other image has a
    say, so the answer is the same on every machine and stays when images are added, and equal bytes never end up on
    both sides. (A split that never changes for old images cannot do better: it must decide on each image by itself, so
    the share of a class is `val_fraction` only on average.)
    """
    return _position(digest, seed) < val_fraction


def _position(digest: str, seed: int | str) -> float:
    return int(hash_bytes(f"{seed}:{digest}".encode())[:13], 16) / 16**13


def _find_positions(rows: Split, seed: int | str) -> NDArray[np.float64]:
    """Where each row (N,) is in the hash order."""
    return np.fromiter((_position(digest, seed) for digest in rows.digests), np.float64, len(rows))


def split_by_content(
    rows: Split, classes: Sequence[str], where: str, val_fraction: float, seed: int, noun: str = "image"
) -> dict[str, Split]:
    """Train and validation rows, stratified in expectation, and by force where a class would have no image in one.

    That image is the class's lowest (or highest) in the hash order, so it too changes only if a new image takes the
    place.

    Parameters
    ----------
    rows
        All of them.
    classes
        Names of the classes.
    where
        What they are the rows of, for the error message.
    val_fraction, seed
        As of `is_validation`.

    Raises
    ------
    DatasetError
        If a class has less than two rows.
    """
    position = _find_positions(rows, seed)
    validation = position < val_fraction
    for label, name in enumerate(classes):
        members = np.flatnonzero(rows.labels == label)
        if len(members) < 2:
            has = f"{len(members)} usable {noun}{'s' * (len(members) != 1)}"
            raise DatasetError(
                f"class {shorten(name)} of {where} has {has}: expected at least 2, one to train on and one to "
                f"validate; add {noun}s"
            )
        if not validation[members].any():
            validation[position == position[members].min()] = True
        if validation[members].all():
            validation[position == position[members].max()] = False
    return {"train": rows.take(~validation), "val": rows.take(validation)}


def hold_out(rows: Split, classes: Sequence[str], share: float, seed: int) -> tuple[Split, Split]:
    """Rows to train on, and others of the same split to choose by: so much of each class, but never all of it.

    Which, the images' contents and the seed say; equal bytes stay together. It says nothing of the validation split:
    other numbers are drawn for it.

    Raises
    ------
    DatasetError
        If no class has two images that differ.
    """
    position = _find_positions(rows, f"holdout {seed}")
    held = np.zeros(len(rows), dtype=bool)
    for label in range(len(classes)):
        members = np.flatnonzero(rows.labels == label)
        if n := round(share * len(members)):
            held[members] = position[members] <= np.sort(position[members])[n - 1]
            if held[members].all():
                held[members] = position[members] < position[members].max()
    if not held.any():  # a few images of each: one of the largest class
        largest = np.argsort(-np.bincount(rows.labels, minlength=len(classes)), kind="stable")
        members = np.flatnonzero(rows.labels == largest[0])
        held[members] = (position[members] == position[members].min()) & (position[members] < position[members].max())
    if not held.any():
        raise DatasetError(
            "no class has two training images that differ, so none can be held out to choose the epoch by; add images, "
            "or keep the last epoch with --select-on none"
        )
    return rows.take(~held), rows.take(held)
