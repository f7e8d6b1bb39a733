"""Every setting of the project with its default, stated once. No torch, no click: plain frozen dataclasses.

A field's name is the name of the command-line option (`batch_size` is `--batch-size`) and of the keyword of the library
function. The fields in a class's `RESULT` decide what comes out; the others only how fast, or where.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from featcache.errors import SettingsError

DEVICES = "auto, cpu, cuda, cuda:N or mps"
SOLVERS = ("auto", "lbfgs", "sklearn", "ridge", "sgd", "knn")
SCALINGS = ("auto", "standard", "l2", "none")
RUNTIMES = ("auto", "eager", "fused", "compile", "openvino", "onnx")
PRECISIONS = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "int8"}
DECODERS = ("pillow", "torch")
STORES = ("float32", "float16")
ENGINES = ("local", "ray")
BATCH_NORMS = ("auto", "train", "fixed")
FINETUNE_CHOICES = {
    "mode": ("full", "head", "staged", "lp-ft"),
    "optimizer": ("sgd", "adamw"),
    "schedule": ("step", "cosine", "one-cycle"),
    "augment": ("crop", "randaugment", "trivialaugment", "none"),
    "select_on": ("holdout", "val", "none"),
    "precision": ("fp32", "bf16", "fp16"),
    "class_weight": ("balanced",),
    "batch_norm": BATCH_NORMS,
}
POOLS = ("avg", "max", "flatten", "cls")
LAYOUTS = ("NCHW", "NHWC", "NF")
CHANNELS = ("RGB", "BGR", "L")
MAX_SIDE = 16_384  # pixels; a picture of that size takes 3 GB
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "lanczos", "box", "hamming")


CHOICES = {"pool": POOLS, "layout": LAYOUTS, "channels": CHANNELS, "interpolation": INTERPOLATIONS}
EXECUTION = ("precision", "decoder")  # decide the features, and are no part of the backbone
VIEWS = ("views", "test_views")  # decide how many rows of features there are of an image, and no row
MAX_COUNT = 10**9  # of epochs, images in a batch, ...
MAX_NUMBER = 1e38  # that float32 still holds
MAX_SEED = 2**62
MAX_REPEATS = 100  # of one training, with other seeds
MAPS = ("tsne", "umap")
MAX_VIEWS = 1000  # of one image
# What stands for the backbone of features that were made elsewhere, perhaps followed by ":" and what made them.
IMPORTED = "imported"


def name_option(name: str) -> str:
    """A setting as it is typed.

    >>> name_option("C"), name_option("batch_size")
    ('-C', '--batch-size')
    """
    return f"-{name}" if len(name) == 1 else "--" + name.replace("_", "-")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all the settings below have in common."""

    RESULT: ClassVar[tuple[str, ...]] = ()
    OPTIONAL: ClassVar[tuple[str, ...]] = ()

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide what comes out, as plain JSON values; optional ones only if they were stated."""
        values = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}
        stated = {name: values[name] for name in self.OPTIONAL if values[name] not in (None, [])}
        return {name: value for name, value in values.items() if name in self.RESULT} | stated

    def _require(self, condition: bool, name: str, expected: str) -> None:
        if not condition:
            raise SettingsError(f"{name_option(name)} is {getattr(self, name)!r}: expected {expected}")


@dataclass(frozen=True, kw_only=True)
class ImageSettings(Settings):
    """What the network sees of an image, where it is not what belongs to the weights; None is that.

    Attributes
    ----------
    input_size
        (H, W) in pixels.
    resize
        The shorter side is resized to this before the middle is cut out; (H, W) resizes to exactly that.
    interpolation
        One of `INTERPOLATIONS`.
    channels
        "RGB", "BGR" or "L".
    mean, std
        One number per channel, or one for all, of pixel values in [0, `scale`].
    scale
        The largest pixel value: 1 or 255.
    """

    IMAGES: ClassVar[tuple[str, ...]] = (
        "input_size",
        "resize",
        "interpolation",
        "channels",
        "mean",
        "std",
        "scale",
    )

    input_size: tuple[int, int] | None = None
    resize: int | tuple[int, int] | None = None
    interpolation: str | None = None
    channels: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        self._spread()
        for name, choices in CHOICES.items():
            value = getattr(self, name, None)
            self._require(value is None or value in choices, name, " or ".join(choices))
        for name in ("input_size", "resize"):
            value = getattr(self, name)
            sides = value if isinstance(value, tuple) else (value or 1,)
            self._require(all(1 <= side <= MAX_SIDE for side in sides), name, f"1 to {MAX_SIDE:,} pixels")
        for name in ("mean", "std"):
            self._require(all(map(math.isfinite, getattr(self, name) or ())), name, "numbers that are finite")
        self._require(not self.std or 0 not in self.std, "std", "numbers other than 0")
        self._require(self.scale is None or 0 < self.scale < math.inf, "scale", "a number above 0, such as 1 or 255")

    def _spread(self) -> None:
        """One layer is a list of one, one number a square, or all channels."""
        for name in ("layer", "mean", "std", "input_size"):
            value = getattr(self, name, None)
            if isinstance(value, str | int | float):
                value = (value, value) if name == "input_size" else (value,)
            if value is not None:
                object.__setattr__(self, name, tuple(value))

    def image_settings(self) -> dict[str, Any]:
        """The fields of an `InputFormat`."""
        return {name: getattr(self, name) for name in self.IMAGES}


@dataclass(frozen=True, kw_only=True)
class ExtractConfig(ImageSettings):
    """How images become features; what they must look like is in `ImageSettings`.

    Attributes
    ----------
    backbone
        Name of the pretrained network.
    weights
        "default", "none" (random, made from `seed`), one of the names that `featcache backbones` lists, a file (.pth,
        .safetensors), or https://...#sha256=...
    layer
        Named layers whose outputs are the features, side by side: "NAME" or "NAME:POOL". None: what goes into the
        classifier.
    pool
        How a layer's map becomes a vector: "avg", "max", "flatten" or "cls".
    layout
        Of an ONNX network's input: "NCHW", "NHWC" or "NF" (rows of numbers).
    batch_size
        Images per forward pass; None is 4 on a CPU, whose caches overflow soon, and 64 on a GPU.
    workers
        Processes that decode images beside this one; on a CPU, of all runtimes but eager, threads that decode and run
        the network. None chooses from the machine.
    device
        Where the network runs; "auto" is CUDA where there is one, else the CPU.
    runtime
        How it runs there: "auto", "eager", "fused", "compile", "openvino" or "onnx" (see `featcache.runtime`).
    precision
        In which the network computes: "fp32", "bf16", "fp16" or "int8". None is that of the cache that is there, else
        fp32 on a CPU and fp16 on CUDA.
    decoder
        "pillow" or "torch" (see `featcache.preprocessing.Preprocessing`). None is that of the cache that is there, else
        "pillow" for the eager runtime, the reference, and "torch" for all others.
    val_fraction
        Share of the images that validates, where the folder has no split of its own.
    seed
        Chooses that split, the views, and the weights where `weights` is "none".
    views
        Random views of each training image that are kept beside it: crops of random size, perhaps mirrored. None is as
        many, and the very same, as in the cache that is there, else 0; 0 drops them.
    test_views
        The same of each image of every other split, to average over when a head is used.
    skip_bad
        Leave out files that cannot be used as images, instead of stopping.
    store
        Precision in which the features are kept, "float32" or "float16".
    reuse
        Other caches whose rows may be taken, if the same extractor made them.
    rehash
        Trust neither the times of the images' files nor the cache: read all of both.
    wait
        Wait for another process that extracts into the same file, instead of stopping.
    force
        Replace a cache that was made by another extractor.
    engine
        What deals out the work: "local", this process, or "ray", a cluster of Ray's.
    address
        Of the cluster, as Ray has it ("auto" or HOST:PORT); None starts one on this machine.
    """

    RESULT: ClassVar[tuple[str, ...]] = ("backbone", "weights", "val_fraction", "seed", "store")
    OPTIONAL: ClassVar[tuple[str, ...]] = (
        "layer",
        "pool",
        *ImageSettings.IMAGES,
        "layout",
        *EXECUTION,
        *VIEWS,
    )
    IMAGES: ClassVar[tuple[str, ...]] = (*ImageSettings.IMAGES, "layout")

    backbone: str = "resnet18"
    weights: str = "default"
    layer: tuple[str, ...] = ()
    pool: str | None = None
    layout: str | None = None
    batch_size: int | None = None
    workers: int | None = None
    device: str = "auto"
    runtime: str = "auto"
    precision: str | None = None
    decoder: str | None = None
    val_fraction: float = 0.2
    seed: int = 0
    views: int | None = None
    test_views: int | None = None
    skip_bad: bool = False
    store: str = "float32"
    reuse: tuple[str, ...] = ()
    rehash: bool = False
    wait: bool = False
    force: bool = False
    engine: str = "local"
    address: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require(self.engine in ENGINES, "engine", " or ".join(ENGINES))
        self._require(self.address is None or self.engine == "ray", "address", "--engine ray beside it")
        self._require(self.store in STORES, "store", " or ".join(STORES))
        self._require(self.runtime in RUNTIMES, "runtime", " or ".join(RUNTIMES))
        self._require(self.precision in (None, *PRECISIONS), "precision", " or ".join(PRECISIONS))
        self._require(self.decoder in (None, *DECODERS), "decoder", " or ".join(DECODERS))
        self._require(self.batch_size is None or self.batch_size >= 1, "batch_size", "1 or more")
        self._require(self.workers is None or self.workers >= 0, "workers", "0 or more")
        self._require(0 < self.val_fraction < 1, "val_fraction", "a share between 0 and 1")
        self._require(self.seed >= 0, "seed", "0 or more")
        for name in VIEWS:
            self._require(0 <= (getattr(self, name) or 0) <= MAX_VIEWS, name, f"0 to {MAX_VIEWS:,}")

    def network_settings(self) -> dict[str, Any]:
        """Those that a backbone is loaded with, beside its images."""
        return {name: getattr(self, name) for name in ("weights", "seed", "layer", "pool")}


@dataclass(frozen=True, kw_only=True)
class ImportConfig(Settings):
    """How a table of features that were made elsewhere becomes a cache.

    Attributes
    ----------
    array
        The array (.npz) or list-typed column (.parquet) that holds the features, where it has another name than usual.
    labels, paths, split
        Where each row's class, image path, and split ("train", "val" or "test") are: a column of the table, or a file.
        None takes the column of the usual name if there is one.
    data
        Folder that the paths are relative to; None is the table's own.
    name
        What made the features, in a word.
    val_fraction
        Share of the rows that validates, where no split is given.
    seed
        Chooses which.
    store
        Precision in which the features are kept, "float32" or "float16".
    wait
        Wait for another process that writes the same file, instead of stopping.
    force
        Replace a cache that was made from something else.
    """

    RESULT: ClassVar[tuple[str, ...]] = (
        "array",
        "labels",
        "paths",
        "split",
        "data",
        "name",
        "val_fraction",
        "seed",
        "store",
    )

    array: str | None = None
    labels: str | None = None
    paths: str | None = None
    split: str | None = None
    data: str | None = None
    name: str | None = None
    val_fraction: float = ExtractConfig.val_fraction
    seed: int = ExtractConfig.seed
    store: str = ExtractConfig.store
    wait: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for field in ("array", "labels", "paths", "split", "data", "name"):
            self._require(getattr(self, field) != "", field, "a name that is not empty")
        self._require(self.name is None or self.name.isprintable(), "name", "a word that can be printed")
        self._require(self.store in STORES, "store", " or ".join(STORES))
        self._require(0 < self.val_fraction < 1, "val_fraction", "a share between 0 and 1")
        self._require(self.seed >= 0, "seed", "0 or more")


@dataclass(frozen=True, kw_only=True)
class HeadConfig(Settings):
    """How a head is fitted to cached features.

    Attributes
    ----------
    solver
        "lbfgs", "sklearn", "ridge", "sgd" or "knn" (see `featcache.heads`); "auto" is "lbfgs", and "sgd" where the
        features would not fit into half of the memory that is free.
    C
        Inverse strength of the L2 penalty, as in scikit-learn, of ridge 1 / alpha; None chooses it.
    grid
        The values of C that are tried; None is the solver's own.
    k, temperature
        Of knn: how many neighbours vote, and how fast a vote fades; None chooses them.
    scaling
        "standard" standardises every feature, "l2" divides every row by its length, "none" leaves the features'
        proportions; "auto" standardises too, and below a thousand images pulls variances towards their mean.
    class_weight
        "balanced" lets all classes count the same; None lets all images.
    select_on
        "cv" chooses by cross-validation on the training split, "val" on the validation split: the classic habit, and
        optimistic.
    folds
        Folds of the cross-validation, at most the size of the smallest class.
    calibrate
        Divide the logits by the temperature that suits held-out folds.
    views
        Whether to learn from the augmented views that the features hold; None: if they hold some.
    tta
        Whether to average predictions over the views of the image that is predicted: test-time augmentation.
    shots
        Learn from so many images of each class, drawn at random.
    fraction
        Learn from this share of the images of each class, drawn at random.
    repeats
        How many times to draw them.
    curve
        Also learn from growing shares of the training images: would more of them help?
    epochs, batch_size, lr
        Of sgd: passes over the images, images per step, and the largest learning rate of AdamW. The steps are taken in
        coordinates in which the curvature is about 1, so that the rate needs no search.
    device
        Of lbfgs: "cpu", "cuda" or "auto", which is CUDA where there is one.
    seed
        Shuffles the folds and the rows, and draws images.
    """

    RESULT: ClassVar[tuple[str, ...]] = ("solver", "C", "folds", "grid", "seed")
    OPTIONAL: ClassVar[tuple[str, ...]] = (
        "k",
        "temperature",
        "scaling",
        "class_weight",
        "select_on",
        "calibrate",
        "views",
        "tta",
        "shots",
        "fraction",
        "repeats",
        "epochs",
        "batch_size",
        "lr",
    )

    solver: str = "auto"
    C: float | None = None
    grid: tuple[float, ...] | None = None
    k: int | None = None
    temperature: float | None = None
    scaling: str = "auto"
    class_weight: str | None = None
    select_on: str = "cv"
    folds: int = 5
    calibrate: bool = False
    views: bool | None = None
    tta: bool = False
    shots: int | None = None
    fraction: float | None = None
    repeats: int = 5
    curve: bool = False
    epochs: int = 5
    batch_size: int = 1024
    lr: float = 0.02
    device: str = "auto"
    seed: int = 0

    # Settings that some solvers do not heed, and who does; "auto" stands for lbfgs or sgd.
    OF_SOLVERS: ClassVar[dict[str, tuple[str, ...]]] = {
        **dict.fromkeys(("C", "grid", "scaling"), ("lbfgs", "sklearn", "ridge", "sgd")),
        **dict.fromkeys(("k", "temperature"), ("knn",)),
        **dict.fromkeys(("epochs", "batch_size", "lr"), ("sgd",)),
        "device": ("lbfgs",),
    }

    def list_unheeded(self) -> list[str]:
        """The settings, other than by default, that the solver does not heed; the CPU is every solver's."""
        solvers = {"lbfgs", "sgd"} if self.solver == "auto" else {self.solver}
        return [
            name
            for name, heeding in self.OF_SOLVERS.items()
            if getattr(self, name) not in (getattr(HeadConfig, name), "cpu") and not solvers.intersection(heeding)
        ]

    def __post_init__(self) -> None:
        self._require(self.solver in SOLVERS, "solver", " or ".join(SOLVERS))
        self._require(self.C is None or 0 < self.C < math.inf, "C", "a number above 0")
        self._require(self.grid is None or all(0 < value < math.inf for value in self.grid), "grid", "numbers above 0")
        self._require(self.grid is None or len(self.grid) > 0, "grid", "numbers above 0")
        self._require(self.k is None or self.k >= 1, "k", "1 or more")
        self._require(self.temperature is None or 0 < self.temperature < math.inf, "temperature", "a number above 0")
        self._require(self.scaling in SCALINGS, "scaling", " or ".join(SCALINGS))
        self._require(self.class_weight in (None, "balanced"), "class_weight", "balanced, or nothing")
        self._require(self.select_on in ("cv", "val"), "select_on", "cv or val")
        self._require(self.folds >= 2, "folds", "2 or more")
        self._require(self.shots is None or self.shots >= 1, "shots", "1 or more")
        self._require(self.fraction is None or 0 < self.fraction <= 1, "fraction", "a share above 0, at most 1")
        self._require(self.repeats >= 1, "repeats", "1 or more")
        self._require(self.epochs >= 1, "epochs", "1 or more")
        self._require(self.batch_size >= 1, "batch_size", "1 or more")
        self._require(0 < self.lr < math.inf, "lr", "a number above 0")
        self._require(self.seed >= 0, "seed", "0 or more")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(ImageSettings):
    """How a network is trained on the images themselves.

    The defaults are the classic recipe of PyTorch's transfer-learning tutorial
    (https://docs.pytorch.org/tutorials/beginner/transfer_learning_tutorial.html): SGD, a step schedule, 25 epochs of
    batches of 4; only the epoch is chosen on held-out training images and not on those that are reported. What None
    stands for is said by `settle`.

    Attributes
    ----------
    backbone, weights, device, val_fraction, skip_bad
        As in `ExtractConfig`.
    seed
        Holds out, shuffles, augments and makes the new last layer.
    split_seed
        Chooses the validation split, and random weights, as the seed of `ExtractConfig` does; None is `seed`. Runs that
        differ in `seed` alone are then on the same images.
    mode
        "full" trains all parameters from the start, "head" the last layer through the frozen network, "staged" first
        the last layer and then everything, "lp-ft" everything, beginning with the linear head that fits the cached
        features: linear probing, then fine-tuning (Kumar et al., 2022, https://arxiv.org/abs/2202.10054).
    features
        Of lp-ft: the cache, made or extended where it has to be.
    epochs
        Passes over the training images.
    head_epochs
        Of staged: passes in which the last layer alone is trained, before those.
    batch_size
        Images per gradient step, of all processes together.
    lr, lr_backbone
        The largest learning rate of the last layer, and of all else.
    layer_decay
        Of each layer, block by block from the head down, the learning rate is so many times that of the one above it.
    optimizer, momentum, weight_decay
        "sgd" with this momentum, or "adamw"; norms and biases never decay.
    schedule, step_size, gamma, warmup
        "step" multiplies the learning rate by `gamma` every `step_size` epochs, "cosine" and "one-cycle" take it to
        zero; before that it grows for `warmup` epochs.
    batch_norm
        "train" lets BatchNorm follow the batches, "fixed" keeps its statistics, "auto" is the backbone's own default,
        and "fixed" for lp-ft, whose head was fitted to such features.
    augment
        "crop": random crops, mirrored or not; "randaugment" and "trivialaugment" do more, "none" does nothing.
    mixup, cutmix
        Their alpha; 0 mixes nothing.
    label_smoothing
        Share of the target that is spread over all classes.
    class_weight
        "balanced" lets all classes count the same in the loss; None lets all images.
    ema
        Decay per step of an average of the weights, which is then evaluated and kept.
    select_on
        What chooses the epoch whose weights are kept: "holdout", a part of the training images; "val", the validation
        split: the classic habit, and optimistic where that is what is reported; "none": nothing, the last is kept.
    holdout_fraction
        Share of the training images that is held out.
    patience
        Stop after so many epochs without a better one.
    time_budget
        Seconds that all of it may take; the training is cut short, in the middle of an epoch if need be.
    precision
        "fp32", or "bf16" and "fp16" under autocast.
    compile
        Let torch.compile make the network faster, which takes a minute at first.
    channels_last
        Whether images lie in memory channel beside channel.
    deterministic
        Only operators that give the same every time, on CUDA too.
    cache_images
        Keep decoded images in memory, as many as fit into a quarter of what is free.
    workers
        Processes that decode. None chooses, and each image has random numbers of its own, so that their number does
        not matter; 0 is PyTorch's plain loop, bit for bit: one process, one stream of random numbers.
    resume
        Go on where an unfinished run of the same settings was left.
    checkpoint_every
        Seconds between checkpoints.
    tensorboard
        Folder for TensorBoard's event files.
    force
        Replace another run that lies at the output.
    """

    RESULT: ClassVar[tuple[str, ...]] = (
        "backbone",
        "weights",
        "mode",
        "epochs",
        "batch_size",
        "optimizer",
        "lr",
        "lr_backbone",
        "momentum",
        "weight_decay",
        "schedule",
        "step_size",
        "gamma",
        "batch_norm",
        "select_on",
        "val_fraction",
        "seed",
    )
    # Part of the result's settings only where they are not as usual.
    FURTHER: ClassVar[tuple[str, ...]] = (
        "head_epochs",
        "layer_decay",
        "warmup",
        "augment",
        "mixup",
        "cutmix",
        "label_smoothing",
        "class_weight",
        "ema",
        "holdout_fraction",
        "patience",
        "precision",
        "channels_last",
    )

    OPTIONAL: ClassVar[tuple[str, ...]] = ImageSettings.IMAGES

    # Learning rates of the last layer and of all else, by mode and optimiser; `settle` says where they are from.
    RATES: ClassVar[dict[str, dict[str, tuple[float, float]]]] = {
        "full": {"sgd": (1e-3, 1e-3), "adamw": (1e-3, 1e-4)},
        "head": {"sgd": (1e-3, 1e-3), "adamw": (1e-3, 1e-3)},
        "staged": {"sgd": (1e-3, 1e-4), "adamw": (1e-3, 1e-4)},
        "lp-ft": {"sgd": (1e-5, 1e-5), "adamw": (1e-6, 1e-6)},
    }
    WEIGHT_DECAYS: ClassVar[dict[str, float]] = {"sgd": 0.0, "adamw": 0.01}  # the tutorial's; torch's default

    backbone: str = ExtractConfig.backbone
    weights: str = ExtractConfig.weights
    mode: str = "full"
    features: str = "features.h5"
    epochs: int = 25
    head_epochs: int = 1
    batch_size: int = 4
    lr: float | None = None
    lr_backbone: float | None = None
    layer_decay: float = 1.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float | None = None
    schedule: str = "step"
    step_size: int = 7
    gamma: float = 0.1
    warmup: float | None = None
    batch_norm: str = "auto"
    augment: str = "crop"
    mixup: float = 0.0
    cutmix: float = 0.0
    label_smoothing: float = 0.0
    class_weight: str | None = None
    ema: float | None = None
    select_on: str | None = None
    holdout_fraction: float = 0.2
    patience: int | None = None
    time_budget: float | None = None
    precision: str | None = None
    compile: bool = False
    channels_last: bool | None = None
    deterministic: bool = False
    cache_images: bool = True
    workers: int | None = None
    device: str = ExtractConfig.device
    val_fraction: float = ExtractConfig.val_fraction
    seed: int = ExtractConfig.seed
    split_seed: int | None = None
    skip_bad: bool = False
    resume: bool = True
    checkpoint_every: float = 30.0
    tensorboard: str | None = None
    force: bool = False

    def settle(self, *, has_test: bool, clips: bool, device: str, bfloat16: bool) -> FinetuneConfig:
        """The same with every None decided.

        Learning rates and weight decay come from the tables above, for batches of 4. SGD's of "full" and "head",
        the batch size and the weight decay of 0 are the tutorial's. AdamW's are torch's default for a new layer and
        a tenth of it for pretrained ones, with torch's weight decay. "staged" gives what is pretrained a tenth of
        the rate, the discriminative fine-tuning of [1]_. "lp-ft" begins where the head's gradient is nearly zero,
        and a rate that moves the features away from under it undoes what the probe knew: its authors needed 3e-7
        where fine-tuning had 1e-3 [2]_; what was tried here is in docs/finetune.md. The backbone's rate, where only
        the head's is stated, keeps its proportion to it. The epoch is chosen on the validation split where a test
        split is there to be reported, and on held-out training images where not. On CUDA bfloat16 where the GPU has
        it. Channels last, but for clips and for the plain loop of `workers` 0.

        Parameters
        ----------
        has_test
            Whether the data has a test split.
        clips
            Whether clips are trained on.
        device
            Type of the device: "cpu", "cuda" or "mps".
        bfloat16
            Whether it computes in bfloat16 by itself.

        Raises
        ------
        SettingsError
            If clips are to be mixed.

        References
        ----------
        .. [1] Howard & Ruder, ULMFiT, 2018, https://arxiv.org/abs/1801.06146
        .. [2] Kumar et al., 2022, https://github.com/AnanyaKumar/transfer_learning/issues/3
        """
        for name in ("mixup", "cutmix"):
            self._require(not (clips and getattr(self, name)), name, "0: clips are not mixed")
        self._require(not (clips and self.channels_last), "channels_last", "nothing: clips have another order")
        usual, usual_backbone = self.RATES[self.mode][self.optimizer]
        lr = usual if self.lr is None else self.lr
        return replace(
            self,
            lr=lr,
            lr_backbone=lr * (usual_backbone / usual)
            if self.lr_backbone is None and self.mode != "head"
            else self.lr_backbone,
            weight_decay=self.WEIGHT_DECAYS[self.optimizer] if self.weight_decay is None else self.weight_decay,
            select_on=self.select_on or ("val" if has_test else "holdout"),
            precision=self.precision or ("bf16" if device == "cuda" and bfloat16 else "fp32"),
            channels_last=not (clips or self.one_stream) if self.channels_last is None else self.channels_last,
        )

    @property
    def one_stream(self) -> bool:
        """Whether all random numbers come from one stream, as in PyTorch's plain loop."""
        return self.workers == 0

    @property
    def data_seed(self) -> int:
        """What chooses the split and random weights."""
        return self.seed if self.split_seed is None else self.split_seed

    @property
    def all_epochs(self) -> int:
        """Passes over the training images, those of the last layer alone included."""
        return self.epochs + (self.head_epochs if self.mode == "staged" else 0)

    def result_settings(self) -> dict[str, Any]:
        """The settings that decide what comes out, as plain JSON values; the rarer ones only where they are stated.

        A time budget is none of them: it decides only if it is spent (see `RunRecord.settings`).
        """
        usual = {name: getattr(FinetuneConfig, name) for name in self.FURTHER}
        usual.update(precision="fp32", channels_last=True)
        further = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        values = super().result_settings() | further | ({"one_stream": True} if self.one_stream else {})
        if self.select_on == "holdout":
            values["holdout_fraction"] = self.holdout_fraction
        if self.data_seed != self.seed:
            values["split_seed"] = self.data_seed
        idle = {
            "head_epochs": self.mode != "staged",
            "momentum": self.optimizer != "sgd",
            "step_size": self.schedule != "step",
            "gamma": self.schedule != "step",
        }
        return {name: value for name, value in values.items() if not idle.get(name)}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in FINETUNE_CHOICES.items():
            value = getattr(self, name)
            known = value in choices or (value is None and getattr(FinetuneConfig, name) is None)
            self._require(known, name, " or ".join(choices))
        for name in ("epochs", "head_epochs", "batch_size", "step_size", "patience"):
            value = getattr(self, name)
            self._require(value is None or _is_whole(value, 1, MAX_COUNT), name, f"a whole number, 1 to {MAX_COUNT:,}")
        for name in ("lr", "lr_backbone", "gamma", "time_budget"):
            value = getattr(self, name)
            self._require(value is None or (_is_number(value) and 0 < value < MAX_NUMBER), name, "a number above 0")
        for name in ("weight_decay", "warmup", "mixup", "cutmix", "checkpoint_every"):
            value = getattr(self, name)
            self._require(value is None or (_is_number(value) and 0 <= value < MAX_NUMBER), name, "0 or more")
        for name in ("mixup", "cutmix"):
            self._require(not 0 < getattr(self, name) < 0.001, name, "0, or 0.001 and more")
        self._require(self.warmup is None or self.warmup < self.epochs, "warmup", f"fewer epochs than {self.epochs}")
        self._require(0 <= self.momentum < 1, "momentum", "0 or more, below 1")
        self._require(0 < self.layer_decay <= 1, "layer_decay", "a number above 0, at most 1")
        self._require(0 <= self.label_smoothing < 1, "label_smoothing", "0 or more, below 1")
        self._require(self.ema is None or 0 < self.ema < 1, "ema", "a number between 0 and 1")
        self._require(self.workers is None or _is_whole(self.workers, 0, MAX_COUNT), "workers", "0 or more")
        self._require(0 < self.val_fraction < 1, "val_fraction", "a share between 0 and 1")
        self._require(0 < self.holdout_fraction < 1, "holdout_fraction", "a share between 0 and 1")
        for name in ("seed", "split_seed"):
            value = getattr(self, name)
            self._require(value is None or _is_whole(value, 0, MAX_SEED), name, f"a whole number, 0 to {MAX_SEED:,}")
        self._require(self.tensorboard != "", "tensorboard", "a folder")
        self._check_heeded()

    def _check_heeded(self) -> None:
        """Raise a SettingsError if a setting is stated that would do nothing beside the others."""
        for names, heeded, where in (
            (("head_epochs",), self.mode == "staged", "--mode staged"),
            (("lr_backbone", "layer_decay"), self.mode != "head", "a --mode that trains the backbone"),
            (("step_size", "gamma"), self.schedule == "step", "--schedule step"),
            (("momentum",), self.optimizer == "sgd", "--optimizer sgd"),
            (("patience",), self.select_on != "none", "--select-on holdout or val"),
            (("holdout_fraction",), self.select_on in (None, "holdout"), "--select-on holdout"),
        ):
            for name in names:
                if not heeded and getattr(self, name) != getattr(FinetuneConfig, name):
                    raise SettingsError(f"{name_option(name)} would do nothing here: it is of {where}")


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Settings):
    """What a comparison on a folder wants stated; None leaves it to what exists, else to the default.

    Attributes
    ----------
    arms
        The ways that are compared, each as "KIND" or "KIND:WHAT" (see `Way`): "head" and "head:SOLVER", a head on the
        cached features; "views" and "views:SOLVER", the same on augmented views too; "finetune" and "finetune:MODE".
    features
        The cache file, made if it is not there; of several backbones each has one, named after both.
    runs
        The folder of the runs, named after the arms, each made if it is not there.
    backbone
        One, or several: every arm is then made with each.
    weights, val_fraction, epochs, batch_size, lr
        As in `FinetuneConfig`; the first two also for the extraction.
    seed
        Of the extraction, and the first of the seeds.
    seeds
        With how many seeds each arm is trained, on the same images.
    solver, C
        As in `HeadConfig`, where the arm does not say.
    views
        Of the arms "views": how many views of each training image.
    budget
        Seconds that all of it may take: what is missing is then made with fewer seeds, and cut short if need be.
    map
        What else than PCA draws the map of the features: "tsne" or "umap".
    curve
        Whether the report has a learning curve of the head; None where it takes less than a minute.
    store, workers, device, skip_bad
        As in `ExtractConfig`.
    force
        Replace a cache or runs that were made with other settings.
    """

    KINDS: ClassVar[dict[str, tuple[str, ...]]] = {
        "head": SOLVERS,
        "views": SOLVERS,
        "finetune": FINETUNE_CHOICES["mode"],
    }

    arms: tuple[str, ...] = ("head", "finetune")
    features: str = "features.h5"
    runs: str = "runs"
    backbone: str | tuple[str, ...] | None = None
    weights: str | None = None
    val_fraction: float | None = None
    seed: int | None = None
    seeds: int = 1
    views: int | None = None
    budget: float | None = None
    map: str | None = None
    curve: bool | None = None
    epochs: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    solver: str | None = None
    C: float | None = None
    store: str | None = None
    workers: int | None = None
    device: str = ExtractConfig.device
    skip_bad: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "arms", tuple(self.arms))
        self._require(len(self.arms) > 0, "arms", "at least one")
        for name, repeated in (("arms", self.arms), ("backbone", self.backbones)):
            self._require(len(set(repeated)) == len(repeated), name, "each once")
        for arm in self.arms:
            kind, _, what = arm.partition(":")
            if kind not in self.KINDS or (":" in arm and what not in self.KINDS[kind]):
                known = "; ".join(f"{kind}[:{'|'.join(words)}]" for kind, words in self.KINDS.items())
                raise SettingsError(f"--arm is {arm!r}: expected {known}")
        self._require(_is_whole(self.seeds, 1, MAX_REPEATS), "seeds", f"a whole number, 1 to {MAX_REPEATS}")
        self._require(self.budget is None or 0 < self.budget < math.inf, "budget", "a time above 0, such as 10m")
        self._require(self.map in (None, *MAPS), "map", " or ".join(MAPS))
        self._require(self.views is None or 1 <= self.views <= MAX_VIEWS, "views", f"1 to {MAX_VIEWS:,}")
        idle = self.views is not None and not any(arm.startswith("views") for arm in self.arms)
        self._require(not idle, "views", "an --arm views beside it")

    @property
    def backbones(self) -> tuple[str, ...]:
        """Those that were stated."""
        if isinstance(self.backbone, tuple | list):
            return tuple(self.backbone)
        return () if self.backbone is None else (self.backbone,)

    def stated(self, *names: str) -> dict[str, Any]:
        """Those of the named settings that were stated."""
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ShowConfig(Settings):
    """What a picture is to show. None is not stated: what is stated has to be of use for what is shown.

    Attributes
    ----------
    image
        Show this one and random views of it: a path, relative to the data set or not.
    n_images
        Pictures in the grid, at most.
    seed
        Chooses the images, and what augmentation does.
    backbone
        Whose preprocessing images of a folder get; None is resnet18.
    augment, mixup, cutmix
        As in `FinetuneConfig`; None is what is usual there.
    split
        Of a run, "val" or "test"; of a cache also "train". None is the first of a cache, and val of a run.
    class_name
        Only images of this class.
    wrong
        Only predictions that are wrong, the most confident first.
    data
        Where the images of a run or a cache are now, if they have moved.
    window
        Open a window; a file is then written only where an output is stated.
    """

    image: str | None = None
    n_images: int = 8
    seed: int = 0
    backbone: str | None = None
    augment: str | None = None
    mixup: float | None = None
    cutmix: float | None = None
    split: str | None = None
    class_name: str | None = None
    wrong: bool = False
    data: str | None = None
    window: bool = False

    MOST: ClassVar[int] = 96  # pictures
    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val", "test")

    def __post_init__(self) -> None:
        most, augments = self.MOST, FINETUNE_CHOICES["augment"]
        self._require(_is_whole(self.n_images, 1, most), "n_images", f"a whole number, 1 to {most}")
        self._require(_is_whole(self.seed, 0, MAX_SEED), "seed", f"a whole number, 0 to {MAX_SEED:,}")
        self._require(self.augment is None or self.augment in augments, "augment", " or ".join(augments))
        self._require(self.split is None or self.split in self.SPLITS, "split", " or ".join(self.SPLITS))
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            fits = value is None or (_is_number(value) and (value == 0 or 0.001 <= value < MAX_NUMBER))
            self._require(fits, name, "0, or 0.001 and more")


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Settings):
    """How a data set is audited from its cached features.

    Attributes
    ----------
    neighbours
        How many of the nearest images an outlier's distance is averaged over.
    threshold
        Similarity from which on two images are near-duplicates: the cosine of the angle between their features as seen
        from the mean of all; docs/audit.md has what it finds.
    folds
        Of the cross-validation whose heads judge the labels.
    seed
        Shuffles them.
    top
        How many outliers are kept, at least; 1 % of the images are, where that is more.
    """

    neighbours: int = 20
    threshold: float = 0.9
    folds: int = 5
    seed: int = 0
    top: int = 10

    def __post_init__(self) -> None:
        self._require(_is_whole(self.neighbours, 1, MAX_COUNT), "neighbours", "a whole number, 1 or more")
        self._require(_is_number(self.threshold) and 0 < self.threshold < 1, "threshold", "a number between 0 and 1")
        self._require(_is_whole(self.folds, 2, MAX_COUNT), "folds", "a whole number, 2 or more")
        self._require(_is_whole(self.seed, 0, MAX_SEED), "seed", f"a whole number, 0 to {MAX_SEED:,}")
        self._require(_is_whole(self.top, 0, MAX_COUNT), "top", "a whole number, 0 or more")


def _is_whole(value: object, least: int, most: int) -> bool:
    return isinstance(value, int) and least <= value <= most


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def is_imported(backbone: str) -> bool:
    """Whether it is no backbone of featcache's but stands for features that were made elsewhere.

    >>> is_imported("imported"), is_imported("imported:clip"), is_imported("resnet18")
    (True, True, False)
    """
    return backbone.partition(":")[0] == IMPORTED


# Where results go when the user does not say, relative to the current folder.
FEATURES_FILE = "features.h5"
RUNS_DIR = "runs"
