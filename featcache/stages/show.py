"""Look at it: a training batch, augmented views of one image, what a cache was made of, or a run's predictions.

Each is a grid of pictures, a PNG file or a window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from featcache import files
from featcache.augmentation import make_mix, make_training_transform, seeded
from featcache.backbones import describe_preprocessing
from featcache.cache import FeatureCache, is_index, open_cache
from featcache.cache.reading import format_command
from featcache.config import ExtractConfig, FinetuneConfig, ShowConfig, name_option
from featcache.dataset import (
    Root,
    Source,
    Split,
    hash_clip,
    is_clip_name,
    is_image_name,
    list_dataset,
    name_root,
    names_source,
    open_root,
)
from featcache.errors import (
    BadImage,
    BadImagesError,
    CacheError,
    DatasetError,
    FeatcacheError,
    ImageError,
    InputError,
    RunError,
    SettingsError,
)
from featcache.images import Batch, ImageMemory, ImageRows, Transform, ViewRows, denormalise, make_evaluation_transform
from featcache.plots import Pictures, check_window, draw_grid, open_window, save_figure
from featcache.preprocessing import Preprocessing
from featcache.runs import Predictions, RunRecord, is_run, name_predictions, read_predictions, read_record
from featcache.storage import Place, RemotePath, locate, locate_local
from featcache.views import Views, draw_view

Target: TypeAlias = Root | RemotePath  # of images, a run or a cache; a cache in a store
# For a look at images whose features are imported: how their network wants them is not known.
PLAIN = Preprocessing(resize=224, crop=224, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
MEMORY = 1 << 30  # bytes of one decoded image, of which many views are made

FOLDER, IMAGE, CACHE, CACHED_IMAGE, RUN = "a folder of images", "an image", "a cache", "an image of a cache", "a run"
# The options that are of use for each; those that are of use for all are not here.
USED = {
    FOLDER: ("backbone", "augment", "mixup", "cutmix", "class_name"),
    IMAGE: ("image", "backbone", "augment"),
    CACHE: ("split", "class_name", "data"),
    CACHED_IMAGE: ("image", "data"),
    RUN: ("split", "class_name", "wrong", "data"),
}


@dataclass(frozen=True, kw_only=True)
class Look:
    """What a grid shows.

    Attributes
    ----------
    pictures
        (N, H, W, 3) in [0, 1].
    titles
        N.
    heading
        Above all.
    right
        N, whether a prediction is right; None where nothing is predicted.
    captions
        N paths, or None.
    """

    pictures: Pictures
    titles: list[str]
    heading: str
    right: list[bool] | None = None
    captions: list[str] | None = None


def show(
    target: Place | str,
    output: Path | str | None = None,
    *,
    image: Path | str | None = None,
    n_images: int = ShowConfig.n_images,
    seed: int = ShowConfig.seed,
    backbone: str | None = None,
    augment: str | None = None,
    mixup: float | None = None,
    cutmix: float | None = None,
    split: str | None = None,
    class_name: str | None = None,
    wrong: bool = False,
    data: Path | str | None = None,
    window: bool = False,
) -> Path | None:
    """Draw a grid of pictures, in a PNG file or a window.

    Parameters
    ----------
    target
        A data set's folder: a training batch as the network sees it. An image file, or a folder with `image`: the image
        in evaluation and augmented views of it. A cache: its images as the backbone saw them, or with `image` one and
        the very views of it that the cache holds. A run: its predictions.
    output
        The PNG file; by default batch.png, views.png or images.png in the current folder, or predictions.png in the
        run (predictions_test.png of its test split).
    image, n_images, seed, backbone, augment, mixup, cutmix, split, class_name, wrong, data, window
        As in `featcache.config.ShowConfig`.

    Returns
    -------
    The PNG file; None where there is a window and no `output`.

    Raises
    ------
    SettingsError
        If a setting makes no sense, or is of no use for this target.
    DatasetError, CacheError, RunError
        If the target is none of these, its images are gone or have changed, or there is nothing to show.
    BadImagesError
        If a picture cannot be decoded.
    DeviceError
        If no window can be opened.
    OutputError
        If the file cannot be written.
    """
    config = ShowConfig(
        image=None if image is None else str(image),
        n_images=n_images,
        seed=seed,
        backbone=backbone,
        augment=augment,
        mixup=mixup,
        cutmix=cutmix,
        split=split,
        class_name=class_name,
        wrong=wrong,
        data=None if data is None else str(data),
        window=window,
    )
    place = find_target(target)
    kind = find_kind(place, config)
    check_use(place, kind, config)
    path = choose_output(place, kind, output, config)
    if config.window:
        check_window()
    if path is not None:
        files.check_writable(path)
    draws: dict[str, Callable[[Any, ShowConfig], Look]] = {
        FOLDER: look_at_batch,
        IMAGE: look_at_views,
        CACHE: look_at_cache,
        CACHED_IMAGE: look_at_cached_views,
        RUN: look_at_predictions,
    }
    with seeded(config.seed):  # a network that is only asked for its preprocessing draws random weights
        look = draws[kind](place, config)
    figure = draw_grid(look.pictures, look.titles, right=look.right, captions=look.captions, heading=look.heading)
    if path is not None:
        save_figure(figure, path)
    if config.window:
        open_window(figure)
    return path


def find_target(target: Place | str) -> Target:
    """What a target names, if it is there.

    Raises
    ------
    InputError
        If it is not.
    """
    if names_source(str(target)):
        return open_root(str(target))
    target = locate(target)
    if not target.exists():
        raise InputError(f"{target} does not exist: expected a folder of images, an image, a cache or a run")
    if isinstance(target, Path) and (target / "compare.json").is_file():
        raise InputError(f"{target} is a comparison: open {target / 'report.html'}")
    return target


def find_kind(target: Target, config: ShowConfig) -> str:
    """What there is to see at a target; a folder of images where nothing else is."""
    if isinstance(target, Source):
        return IMAGE if config.image is not None else FOLDER
    if isinstance(target, Path) and is_run(target):
        return RUN
    if target.is_file() and (is_image_name(target.name) or is_clip_name(target.name)):
        return IMAGE
    if target.is_file() or target.suffix in (".h5", ".hdf5"):
        return CACHED_IMAGE if config.image is not None else CACHE
    return IMAGE if config.image is not None else FOLDER


def check_use(target: Target, kind: str, config: ShowConfig) -> None:
    """Raise a SettingsError if an option is stated that would do nothing."""
    every = {name: None for names in USED.values() for name in names}
    for name in every:
        value, used = getattr(config, name), USED[kind]
        twice = name == "image" and isinstance(target, Path) and target.is_file() and kind == IMAGE
        if value not in (None, False) and (name not in used or twice):
            options = ", ".join(name_option(one) for one in used if one != "image")
            raise SettingsError(
                f"{name_option(name)} is of no use here: {target} is {kind}, for which there are {options}"
            )


def choose_output(target: Target, kind: str, output: Path | str | None, config: ShowConfig) -> Path | None:
    """Where the PNG file goes; None is nowhere."""
    if output is not None:
        return locate_local(output, "a picture")
    if config.window:
        return None
    if kind == RUN and isinstance(target, Path):
        return target / ("predictions_test.png" if config.split == "test" else "predictions.png")
    return Path({FOLDER: "batch.png", CACHE: "images.png"}.get(kind, "views.png"))


def look_at_batch(data: Root, config: ShowConfig) -> Look:
    """A random training batch with its labels, augmented and mixed as for fine-tuning."""
    preprocessing = describe_preprocessing(config.backbone or ExtractConfig.backbone)
    listing = list_dataset(str(data), clips=preprocessing.frames > 0)
    train, augment = listing.splits["train"], config.augment or FinetuneConfig.augment
    if preprocessing.frames and (config.mixup or config.cutmix):
        raise SettingsError("--mixup and --cutmix are for images: clips are not mixed")
    chosen = choose_images(train.labels, listing.classes, config)
    mix = make_mix(config.mixup or 0.0, config.cutmix or 0.0, len(listing.classes))
    with seeded(config.seed):
        transform = make_training_transform(preprocessing, augment)
        images = decode_rows(ImageRows(listing.root, [train.paths[i] for i in chosen], transform=transform)).images
        shares = None
        if mix is not None:
            images, shares = mix(images, torch.from_numpy(train.labels[chosen]))
    words = "not augmented" if augment == "none" else f"augmented ({augment})"
    mixed = "".join(f", {name} {value:g}" for name in ("mixup", "cutmix") if (value := getattr(config, name)))
    return Look(
        pictures=denormalise(images, preprocessing),
        titles=[listing.classes[train.labels[i]] for i in chosen]
        if shares is None
        else [name_mix(row, listing.classes) for row in shares],
        heading=f"{PurePosixPath(name_root(listing.root)).name}: a training batch, {words}{mixed}",
    )


def name_mix(shares: Tensor, classes: Sequence[str]) -> str:
    r"""Both labels of a mixed image with their shares (C,), the larger one first; one line each.

    >>> name_mix(torch.tensor([0.25, 0.75]), ["ants", "bees"]), name_mix(torch.tensor([0.0, 1.0]), ["ants", "bees"])
    ('0.75 bees\n0.25 ants', '1.00 bees')
    """
    order = torch.argsort(shares, descending=True)[: int((shares > 0).sum())].tolist()
    return "\n".join(f"{float(shares[label]):.2f} {classes[label]}" for label in order)


def look_at_views(target: Root, config: ShowConfig) -> Look:
    """An image in evaluation, and beside it augmented views, as fine-tuning makes them."""
    root, path = find_image(target, config.image)
    name = config.backbone or ExtractConfig.backbone
    preprocessing, augment = describe_preprocessing(name), config.augment or FinetuneConfig.augment
    memory = ImageMemory(MEMORY)

    def decode(n: int, transform: Transform) -> Tensor:
        return decode_rows(ImageRows(root, [path] * n, transform=transform, memory=memory)).images

    images, n_views = [decode(1, make_evaluation_transform(preprocessing))], config.n_images - 1
    if n_views:
        with seeded(config.seed):
            images.append(decode(n_views, make_training_transform(preprocessing, augment)))
    return Look(
        pictures=denormalise(torch.cat(images), preprocessing),
        titles=["evaluation", *(f"view {i + 1}" for i in range(n_views))],
        heading=f"{path}: as {name} sees it" + (f", and augmented ({augment})" if n_views else ""),
    )


def find_image(target: Root, image: str | None) -> tuple[Root, str]:
    """Folder and name of the one image that is asked for: the target itself, one of its files, or any other.

    Raises
    ------
    DatasetError
        If there is none.
    """
    if isinstance(target, Source):
        return target, image or ""
    if image is None:
        return target.parent, target.name
    for root in (target, Path()):
        if (root / image).exists():
            return root, image
    raise DatasetError(f"no image {image}: expected a path relative to {target}, or a path of its own")


def look_at_cache(target: Place, config: ShowConfig) -> Look:
    """Images of a cache with their labels, as the backbone saw them."""
    cache, name = open_cache(target), config.split or "train"
    if name not in cache.splits:
        raise CacheError(f"{target} has no {name} split: expected {' or '.join(cache.splits)}")
    listing = cache.splits[name].listing
    root = find_root(config.data, cache.provenance["data"], target)
    chosen = choose_images(listing.labels, cache.classes, config)
    preprocessing = find_preprocessing(cache.extractor, root, listing.paths[chosen[0]], target)
    check_unchanged(target, cache, root, listing, chosen)
    paths = [listing.paths[i] for i in chosen]
    batch = decode_rows(ImageRows(root, paths, transform=make_evaluation_transform(preprocessing)))
    seen = "" if preprocessing is PLAIN else f", as {cache.extractor['backbone']} saw them"
    return Look(
        pictures=denormalise(batch.images, preprocessing),
        titles=[cache.classes[listing.labels[i]] for i in chosen],
        captions=paths,
        heading=f"{target.name}: {name} images{seen}",
    )


def look_at_cached_views(target: Place, config: ShowConfig) -> Look:
    """An image of a cache, and the very views of it whose features the cache holds."""
    cache, image = open_cache(target), config.image or ""
    root, path = find_image(find_root(config.data, cache.provenance["data"], target), image)
    preprocessing = find_preprocessing(cache.extractor, root, path, target)
    digest = hash_image(root, path)
    split = find_split(cache, digest, target, image)
    n_views = cache.views.count(split)
    if not n_views:
        raise CacheError(say_without_views(target, cache, split))
    if not cache.views.is_like(Views(train=1, seed=cache.views.seed)):
        raise CacheError(f"the views of {target} are of rules that this featcache does not know; extract them again")
    numbers = [None, *range(min(n_views, config.n_images - 1))]
    rows = ViewRows(root, [path] * len(numbers), numbers=numbers, preprocessing=preprocessing,
                    seed=cache.views.seed, digests=[digest] * len(numbers))  # fmt: skip
    images = rows.make_normalisation()(decode_rows(rows).images)
    some = "the" if len(numbers) > n_views else f"{len(numbers) - 1} of the"
    return Look(
        pictures=denormalise(images, preprocessing),
        titles=[name_view(rows, digest, number, cache.views.seed) for number in numbers],
        heading=f"{path}: as {cache.extractor['backbone']} saw it, and {some} {n_views} views in {target.name}",
    )


def say_without_views(target: Place, cache: FeatureCache, split: str) -> str:
    """Why a cache shows no views, and what to do."""
    if cache.extractor["preprocessing"] is None:
        return f"{target} holds no views: its features are imported; `featcache show IMAGE` draws views of a file"
    option = f"--{'views' if split == 'train' else 'test-views'} 4"
    more = f"`{format_command(target, cache.provenance)} {option}`"
    if is_index(target):
        more = f"`featcache extract ... {option}` into each of its caches, and `featcache index` again,"
    return f"{target} holds no views of its {split} images; {more} adds some, `featcache show IMAGE` draws others"


def say_again(target: Place, cache: FeatureCache) -> str:
    """How what is new gets into a cache."""
    command = format_command(target, cache.provenance)
    if is_index(target):
        return f"extract the cache that it is in again, and `{command}`"
    return f"`{command}` takes in what is new"


def name_view(rows: ViewRows, digest: str, number: int | None, seed: int) -> str:
    """What a cached view shows, in words."""
    if number is None:
        return "evaluation"
    image: Any = rows.decode(0)
    image = image[0] if isinstance(image, list) else image  # of a clip all frames are cut alike
    height, width = image.shape[:2] if isinstance(image, np.ndarray) else image.size[::-1]
    piece = draw_view(digest, number, seed=seed, height=height, width=width)
    share = piece.height * piece.width / (height * width)
    return f"view {number}: {share:.0%} of it{', mirrored' if piece.mirrored else ''}"


def find_split(cache: FeatureCache, digest: str, target: Place, image: str) -> str:
    """The split whose images have one with these contents.

    Raises
    ------
    CacheError
        If there is none.
    """
    for name, split in cache.splits.items():
        if digest in split.listing.digests:
            return name
    raise CacheError(f"{image} is none of the images of {target}, or has changed since; {say_again(target, cache)}")


def look_at_predictions(run: Path, config: ShowConfig) -> Look:
    """Validation or test images with what a run says of them."""
    record = read_record(run)
    predictions = read_split(run, record, config.split or "val")
    right = predictions.labels == predictions.predicted
    confidence = predictions.probabilities.max(axis=1)
    root = find_root(config.data, record.data["folder"], run)
    if config.wrong:
        candidates = select_class(predictions.labels, record.classes, config.class_name)
        candidates = candidates[~right[candidates]]
        chosen = candidates[np.argsort(-confidence[candidates], kind="stable")][: config.n_images]
    else:
        chosen = choose_images(predictions.labels, record.classes, config)
    if not len(chosen):
        of_class = f" of {config.class_name}" if config.class_name else ""
        raise RunError(f"{run} has no wrong prediction to show{of_class}")
    preprocessing = find_preprocessing(record.extractor, root, predictions.paths[chosen[0]], run)
    paths = [predictions.paths[i] for i in chosen]
    batch = decode_rows(ImageRows(root, paths, transform=make_evaluation_transform(preprocessing)))
    return Look(
        pictures=denormalise(batch.images, preprocessing),
        titles=[name_prediction(predictions, i, record.classes) for i in chosen],
        right=right[chosen].tolist(),
        captions=paths,
        heading=describe_predictions(record, predictions, config),
    )


def read_split(run: Path, record: RunRecord, split: str) -> Predictions:
    """The predictions of a split.

    Raises
    ------
    SettingsError, RunError
        If a run has none of it.
    """
    if split == "train":
        raise SettingsError("--split is 'train': a run keeps predictions of val and test images; expected val or test")
    path = run / name_predictions(split)
    if split == "test" and not path.is_file():
        raise RunError(f"{run} has no test split; leave out --split test to see its validation images")
    return read_predictions(path, record.classes)


def name_prediction(predictions: Predictions, i: int, classes: Sequence[str]) -> str:
    """The predicted class with its probability, and the true one where it is another."""
    label, predicted = int(predictions.labels[i]), int(predictions.predicted[i])
    words = f"{classes[predicted]} {predictions.probabilities[i].max():.0%}"
    return words if label == predicted else f"{words}\n(is {classes[label]})"


def describe_predictions(record: RunRecord, predictions: Predictions, config: ShowConfig) -> str:
    """How many of them are right, of the class that is asked for."""
    mine = select_class(predictions.labels, record.classes, config.class_name)
    right = int((predictions.labels == predictions.predicted)[mine].sum())
    what = f"{'test' if config.split == 'test' else 'validation'} images"
    of_class = f" of {config.class_name}" if config.class_name else ""
    return f"{record.title}: {right} of {len(mine)} {what}{of_class} right"


def choose_images(labels: NDArray[np.int64], classes: Sequence[str], config: ShowConfig) -> NDArray[np.int64]:
    """Rows of some images, of the class that is asked for, in random order; at least one.

    Raises
    ------
    DatasetError
        If there is no such class, or no image of it.
    """
    mine = select_class(labels, classes, config.class_name)
    if not len(mine):
        raise DatasetError(f"there is no image of {config.class_name} to show; expected another --class or --split")
    return mine[np.random.default_rng(config.seed).permutation(len(mine))[: config.n_images]]


def select_class(labels: NDArray[np.int64], classes: Sequence[str], name: str | None) -> NDArray[np.int64]:
    """Rows of the images of a class; of None all.

    Raises
    ------
    DatasetError
        If there is no such class.
    """
    if name is None:
        return np.arange(len(labels))
    if name not in classes:
        further = f" and {len(classes) - 10} more" if len(classes) > 10 else ""
        raise DatasetError(f"--class is {name!r}: expected one of {', '.join(classes[:10])}{further}")
    return np.flatnonzero(labels == list(classes).index(name))


def find_root(stated: str | None, recorded: str, target: Place) -> Root:
    """What the paths of a run or a cache are relative to.

    Raises
    ------
    DatasetError, RunError
        If it is not there.
    """
    text = recorded if stated is None else stated
    if names_source(text):
        return open_root(text)
    root = Path(text)
    if stated is None and is_index(locate(text)):
        raise of_kind(target)(
            f"the images of {target} lie in several places that are no folders; `featcache show CACHE.h5` shows those "
            f"of one of the caches in {text}"
        )
    if not root.is_dir():
        raise of_kind(target)(f"the images of {target} are no longer at {root}; say where they are with --data DIR")
    return root


def find_preprocessing(extractor: dict[str, Any], root: Root, path: str, target: Place) -> Preprocessing:
    """How the images of an extractor's features were seen; of imported ones a plain look, if there are images at all.

    Raises
    ------
    CacheError, RunError
        If the features are imported, and there are no images.
    """
    look = extractor["preprocessing"]
    if look is not None:
        return Preprocessing.from_json(look)
    if isinstance(root, Path) and not (root / path).is_file():
        raise of_kind(target)(
            f"the images of {target} are not at {root}: its features are imported; import them with --paths and --data"
        )
    return PLAIN


def of_kind(target: Place) -> type[FeatcacheError]:
    """What an error of a run or a cache is."""
    return RunError if isinstance(target, Path) and is_run(target) else CacheError


def check_unchanged(target: Place, cache: FeatureCache, root: Root, listing: Split, chosen: NDArray[np.int64]) -> None:
    """Raise a CacheError if an image is not the one whose features a cache holds."""
    for i in chosen:
        if hash_image(root, listing.paths[i]) != listing.digests[i]:
            raise CacheError(
                f"{root / listing.paths[i]} has changed since {target} was made; {say_again(target, cache)}"
            )


def hash_image(root: Root, path: str) -> str:
    """Digest of an image's bytes, or of a clip.

    Raises
    ------
    BadImagesError
        If it cannot be read.
    """
    try:
        return hash_clip(root / path)
    except ImageError as error:
        raise BadImagesError([BadImage(path, str(error))], can_leave_out=False) from error


def decode_rows(rows: ImageRows) -> Batch:
    """Decode a few files in this process.

    Raises
    ------
    BadImagesError
        If one cannot be used.
    """
    batch = rows.collate([rows[i] for i in range(len(rows))])
    if batch.bad:
        raise BadImagesError(list(dict.fromkeys(batch.bad)), can_leave_out=False)
    return batch
