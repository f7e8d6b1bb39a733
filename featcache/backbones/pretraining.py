"""What a backbone saw before: whether the images that are reported may have been among them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from featcache.config import is_imported

# What names of weights say about their images, the first that fits.
SETS = (
    (r"kinetics", "Kinetics"),
    (r"coco|voc_labels", "COCO, and ImageNet before it"),
    (r"laion", "LAION, images from the whole web"),
    (r"swag", "billions of public Instagram images"),
    (r"openai|clip|siglip|dfn|datacomp", "image-text pairs from the whole web"),
    (r"lvd|dinov[23]", "LVD, images from the web that resemble ImageNet and other public sets"),
    (r"in22k|in21k|in12k", "the large ImageNet"),
    (r"imagenet|in1k|efficientnet[-_]lite", "ImageNet"),
)
# Validation images of public sets that were drawn from ImageNet, by their fingerprint.
DRAWN_FROM_IMAGENET = {
    "647daa914c6471621d21b9f3493a549189d7079d9fef376da5a2c0a9a0859517": "PyTorch's tutorial calls these ants and bees "
    "“a very small subset of imagenet”",
}
SYNSET = re.compile(r"n\d{8}")


def warn_of_overlap(extractor: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """A remark that the pretraining set may hold the images that are reported; None where it cannot.

    Parameters
    ----------
    extractor
        As a run's record has it.
    data
        The record's: classes and fingerprints.
    """
    weights = extractor["weights"]
    if weights.get("requested") == "none":
        return None
    name = extractor["backbone"]
    what = find_pretraining(extractor)
    if what is None:
        made = "the imported features" if is_imported(name) else f"{name}'s weights ({weights.get('name')})"
        return f"What {made} were trained on is not known here: if it held these images, every accuracy is too high."
    if "ImageNet" not in what:
        return f"{name} was trained on {what}: if these images were among them, every accuracy is too high."
    known = next((DRAWN_FROM_IMAGENET[f] for f in data["fingerprints"].values() if f in DRAWN_FROM_IMAGENET), None)
    if known is None and is_imagenet(data["classes"]):
        known = "the classes here are ImageNet's own"
    if known is None:
        return f"{name} was trained on {what}: if these images were among them, every accuracy is too high."
    return (
        f"{name} was trained on {what}, and {known}: it may have seen the very images that are reported, so that every "
        f"accuracy here may be too high for new ones."
    )


def find_pretraining(extractor: Mapping[str, Any]) -> str | None:
    """What the weights were trained on, from their names; None if that is not known."""
    backbone, weights = str(extractor["backbone"]), extractor["weights"]
    requested = str(weights.get("requested"))
    if requested == "given" or is_imported(backbone) or re.search(r"[/\\#]", requested):
        return None  # a file, an address, an object: its name proves nothing
    words = f"{backbone} {requested} {weights.get('name')}".lower()
    found = next((name for pattern, name in SETS if re.search(pattern, words)), None)
    # torchvision's files are called after the network alone; its classifiers are all of ImageNet
    return found or ("ImageNet" if ":" not in backbone else None)


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether all classes bear names of ImageNet's: synsets, or their words.

    >>> is_imagenet(["tench", "cassette_player"]), is_imagenet(["n01440764"]), is_imagenet(["ants", "bees"])
    (True, True, False)
    """
    from torchvision.models import ResNet18_Weights

    words = {_normalise(name) for name in ResNet18_Weights.DEFAULT.meta["categories"]}
    return all(SYNSET.fullmatch(name) or _normalise(name) in words for name in classes)


def _normalise(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
