"""A real data set with no download: scikit-learn's bundled handwritten digits as an image folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from featcache import files
from featcache.errors import OutputError, SettingsError
from featcache.images import enlarge, save_png

SAMPLES = ("digits",)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A data set that was written: its folder, and images per split."""

    folder: Path
    images: dict[str, int]


def make_sample(
    name: str,
    folder: Path | str,
    *,
    n_train: int = 400,
    n_val: int = 200,
    size: int = 160,
    seed: int = 0,
) -> Sample:
    """Write a data set that comes with an installed library.

    "digits" is the test set of E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI Machine
    Learning Repository (1998), 1797 pictures of 8 x 8 pixels, as scikit-learn bundles it. They are enlarged smoothly,
    with a margin, so that a network sees strokes and not squares.

    Parameters
    ----------
    name
        "digits".
    folder
        Where to; must not hold anything.
    n_train, n_val
        Images per split, stratified; at most 1797 together, at least one of each class.
    size
        Side of the pictures in pixels.
    seed
        Chooses the images.

    Returns
    -------
    Sample

    Raises
    ------
    SettingsError
        If the name is unknown or the numbers do not fit.
    OutputError
        If the folder holds something, or cannot be written.
    """
    if name not in SAMPLES:
        raise SettingsError(f"unknown sample {name!r}: there is {', '.join(SAMPLES)}")
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder} is there already and not empty; choose another place, or remove it")
    pictures, digits, rows = choose_digits(n_train, n_val, seed)
    with files.fill_folder(folder) as temporary:
        for split, chosen in rows.items():
            for row in chosen:
                path = temporary / split / str(digits[row]) / f"digit_{row:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                save_png(enlarge(pictures[row], size), path)
    return Sample(folder=folder, images={split: len(chosen) for split, chosen in rows.items()})


def choose_digits(
    n_train: int, n_val: int, seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64], dict[str, NDArray[np.int64]]]:
    """Pictures (1797, 8, 8) uint8, dark strokes on white, digits (1797,), and the rows of each split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    n = len(digits.target)
    if n_train < 10 or n_val < 10 or n_train + n_val > n:
        raise SettingsError(f"{n_train} + {n_val} images: expected at least 10 in each split and at most {n} in all")
    pictures = np.round(255 - digits.images * (255 / 16)).astype(np.uint8)
    train, val = train_test_split(
        np.arange(n), train_size=n_train, test_size=n_val, stratify=digits.target, random_state=seed
    )
    return pictures, digits.target, {"train": np.sort(train), "val": np.sort(val)}
