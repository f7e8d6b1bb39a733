"""Look at it: a grid of a training batch with its labels, or of a run's predictions, as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from featcache import files
from featcache.augmentation import make_training_transform
from featcache.backbones import describe_preprocessing
from featcache.dataset import list_dataset
from featcache.errors import BadImagesError, RunError
from featcache.images import (
    Batch,
    ImageRows,
    Transform,
    denormalise,
    make_evaluation_transform,
)
from featcache.plots import draw_grid, save_figure
from featcache.preprocessing import Preprocessing
from featcache.runs import is_run, read_predictions, read_record

# For a look at images whose features are imported: how their network wants them is not known.
PLAIN = Preprocessing(resize=224, crop=224, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def show(
    target: Path | str,
    output: Path | str | None = None,
    *,
    n_images: int = 8,
    seed: int = 0,
    backbone: str = "resnet18",
    data: Path | str | None = None,
    wrong: bool = False,
) -> Path:
    """Draw a grid of pictures: of a data set, a training batch as the network sees it; of a run, predictions.

    Parameters
    ----------
    target
        A data set's folder, or a run's.
    output
        The PNG file; by default batch.png in the current folder, or predictions.png in the run.
    n_images
        Pictures in the grid.
    seed
        Chooses them, and the augmentation.
    backbone
        Whose preprocessing a training batch gets.
    data
        Where a run's data set lies now, if it has moved.
    wrong
        Show only predictions that are wrong, the most confident first.

    Returns
    -------
    The PNG file.

    Raises
    ------
    DatasetError, RunError
        If the target is neither a data set nor a run, or the run's images are gone.
    BadImagesError
        If a picture cannot be decoded.
    """
    target = Path(target)
    run = is_run(target)
    path = Path(output) if output else (target / "predictions.png" if run else Path("batch.png"))
    files.check_writable(path)
    if run:
        show_predictions(target, path, n_images=n_images, seed=seed, data=data, wrong=wrong)
    else:
        show_batch(target, path, n_images=n_images, seed=seed, backbone=backbone)
    return path


def show_batch(data: Path, output: Path, *, n_images: int, seed: int, backbone: str) -> None:
    """Draw a random training batch, augmented as for fine-tuning, with its labels."""
    preprocessing = describe_preprocessing(backbone)
    listing = list_dataset(data, clips=preprocessing.frames > 0)
    train = listing.splits["train"]
    chosen = np.random.default_rng(seed).permutation(len(train))[:n_images]
    torch.manual_seed(seed)
    batch = decode_rows(listing.root, [train.paths[i] for i in chosen], make_training_transform(preprocessing))
    figure = draw_grid(
        denormalise(batch.images, preprocessing),
        [listing.classes[train.labels[i]] for i in chosen],
        heading=f"{listing.root.resolve().name}: a training batch, augmented",
    )
    save_figure(figure, output)


def show_predictions(
    run: Path, output: Path, *, n_images: int, seed: int, data: Path | str | None, wrong: bool
) -> None:
    """Draw validation images with what the run says of them."""
    record = read_record(run)
    predictions = read_predictions(run / "predictions.csv", record.classes)
    root = Path(data or record.data["folder"])
    if not root.is_dir():
        raise RunError(f"the images of {run} are no longer at {root}; say where they are with --data DIR")
    right = predictions.labels == predictions.predicted
    confidence = predictions.probabilities.max(axis=1)
    if wrong:
        candidates = np.flatnonzero(~right)
        chosen = candidates[np.argsort(-confidence[candidates])][:n_images]
    else:
        chosen = np.random.default_rng(seed).permutation(len(right))[:n_images]
    if not len(chosen):
        raise RunError(f"{run} has no wrong prediction to show")
    look = record.extractor["preprocessing"]
    preprocessing = PLAIN if look is None else Preprocessing.from_json(look)
    if look is None and not (root / predictions.paths[chosen[0]]).is_file():
        raise RunError(
            f"the images of {run} are not at {root}: its features are imported; import them with --paths and --data"
        )
    batch = decode_rows(root, [predictions.paths[i] for i in chosen], make_evaluation_transform(preprocessing))
    titles = [
        f"{record.classes[predictions.predicted[i]]} {confidence[i]:.0%}"
        + ("" if right[i] else f"\n(is {record.classes[predictions.labels[i]]})")
        for i in chosen
    ]
    heading = f"{record.title}: {int(right.sum())} of {len(right)} right"
    figure = draw_grid(denormalise(batch.images, preprocessing), titles, right=right[chosen].tolist(), heading=heading)
    save_figure(figure, output)


def decode_rows(root: Path, paths: Sequence[str], transform: Transform) -> Batch:
    """Decode a few files in this process.

    Raises
    ------
    BadImagesError
        If one cannot be used.
    """
    rows = ImageRows(root, paths, transform=transform)
    batch = rows.collate([rows[i] for i in range(len(rows))])
    if batch.bad:
        raise BadImagesError(batch.bad)
    return batch
