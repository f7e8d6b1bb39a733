"""Images -> features as a scikit-learn transformer, for pipelines, cross-validation and searches.

The rows that it keeps are those that `extract_features` keeps and takes: parts beside a cache file, and that file
itself. The object holds nothing but its parameters: it is cloned, pickled and sent to other processes without weights.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils import Tags

from featcache.backbones import Backbone, check_unchanged
from featcache.cache import open_cache
from featcache.config import ExtractConfig
from featcache.errors import SettingsError
from featcache.pictures import list_pictures
from featcache.preprocessing import InputFormat, freeze_list
from featcache.progress import SILENT, Progress
from featcache.runtime import select_device
from featcache.stages.plan import take_backbone
from featcache.stages.provide_backbone import find_example, provide_backbone, settle_execution
from featcache.stages.provide_features import TURN, Task, provide_features
from featcache.storage import Place, follow_link, locate

REMEMBERED = 2  # networks that stay loaded in this process: every fold of a search is a fresh clone of the transformer
_loaded: OrderedDict[tuple[Any, ...], Backbone] = OrderedDict()


class FeatureExtractor(TransformerMixin, BaseEstimator):  # type: ignore[misc]  # scikit-learn has no types
    """Turn images into the features of a frozen backbone.

    Parameters
    ----------
    backbone
        Name of a pretrained network, or a `Backbone`, see `wrap_network`.
    weights, seed, layer, pool, input_size, resize, interpolation, channels, mean, std, scale, layout
        As in `featcache.config.ExtractConfig`; one text is one layer, one number a square or every channel.
    store, device, runtime, precision, decoder, batch_size, workers
        As in `featcache.config.ExtractConfig`.
    cache
        Where rows are kept, such as "features.h5": in parts beside it, which any number of processes share and from
        which `extract_features` into that file goes on; rows of that file are taken too. None keeps nothing: every call
        computes its images.
    progress
        A `Progress`, told what is being done.

    Attributes
    ----------
    n_features_out_
        D, once it was fitted; fitting only looks whether everything is all right.

    Notes
    -----
    Images are paths, PIL images or uint8 pixels, (H, W, 3) or (H, W), in a list, an array or a column (N, 1) of a
    table; or one array (N, H, W, 3) or (N, H, W). A row belongs to the extractor and to the bytes of a file or the
    pixels of an image: a path and the pixels that it decodes to are two rows, an image and the array of its pixels one.

    A transformer cannot leave out rows: if images cannot be used there is a `BadImagesError` that names all of them,
    and the rows of the others are kept.

    Examples
    --------
    >>> extractor = FeatureExtractor("resnet18", weights="none")
    >>> extractor.fit_transform(np.zeros((2, 40, 48, 3), np.uint8)).shape
    (2, 512)
    """

    def __init__(
        self,
        backbone: str | Backbone = ExtractConfig.backbone,
        *,
        weights: str = ExtractConfig.weights,
        seed: int = ExtractConfig.seed,
        layer: str | Sequence[str] = ExtractConfig.layer,
        pool: str | None = None,
        input_size: int | tuple[int, int] | None = None,
        resize: int | tuple[int, int] | None = None,
        interpolation: str | None = None,
        channels: str | None = None,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        scale: float | None = None,
        layout: str | None = None,
        store: str = ExtractConfig.store,
        device: str = ExtractConfig.device,
        runtime: str = ExtractConfig.runtime,
        precision: str | None = None,
        decoder: str | None = None,
        batch_size: int | None = None,
        workers: int | None = None,
        cache: Place | str | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.backbone = backbone
        self.weights = weights
        self.seed = seed
        self.layer = layer
        self.pool = pool
        self.input_size = input_size
        self.resize = resize
        self.interpolation = interpolation
        self.channels = channels
        self.mean = mean
        self.std = std
        self.scale = scale
        self.layout = layout
        self.store = store
        self.device = device
        self.runtime = runtime
        self.precision = precision
        self.decoder = decoder
        self.batch_size = batch_size
        self.workers = workers
        self.cache = cache
        self.progress = progress

    def fit(self, X: ArrayLike, y: Any = None) -> FeatureExtractor:  # noqa: N803 - scikit-learn's name
        """See that the settings make sense, that the backbone is there and that these are images.

        Parameters
        ----------
        X
            N images.
        y
            Ignored.

        Raises
        ------
        InputError, SettingsError
            If X is no images, or a setting makes no sense.
        BackboneError, DeviceError, MissingExtraError
            If the network or the device cannot be had.
        """
        del y
        list_pictures(X)
        config, backbone = self._provide()
        select_device(config.device, backbone.network)
        self.n_features_out_ = backbone.width
        return self

    def transform(self, X: ArrayLike) -> NDArray[np.float32]:  # noqa: N803 - scikit-learn's name
        """Features of images, computed where they are not kept yet.

        Parameters
        ----------
        X
            N images.

        Returns
        -------
        features
            (N, D) float32.

        Raises
        ------
        BadImagesError
            If some cannot be used; the rows of all others are kept.
        CacheError, OutputError
            If the place of the cache is something else, or cannot be written.
        FeatcacheError
            As `fit`.
        """
        pictures = list_pictures(X)
        config, backbone = self._provide()
        task = Task(
            pictures=pictures,
            backbone=backbone,
            device=select_device(config.device, backbone.network),
            config=config,
            output=None if self.cache is None else follow_link(locate(self.cache)),
            progress=self.progress or SILENT,
        )
        return provide_features(task)

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """The backbone's name, the layer if such were asked for, and a number, for every column (D,).

        Parameters
        ----------
        input_features
            Ignored.
        """
        del input_features
        backbone = self._provide()[1]
        groups = [(f"{backbone.name}_{pick.name}", pick.width) for pick in backbone.picks]
        names = [f"{name}_{i}" for name, width in groups or [(backbone.name, backbone.width)] for i in range(width)]
        return np.array(names, dtype=object)

    def _provide(self) -> tuple[ExtractConfig, Backbone]:
        """The settings, checked, and the backbone."""
        config, given = read_settings(self.get_params(deep=False))
        if given is None:
            backbone = provide_loaded(config, self.progress or SILENT)
        else:
            check_unchanged(given)
            backbone = given
        return config, settle_execution(
            backbone, config, select_device(config.device, backbone.network), self._find_example()
        )

    def _find_example(self) -> Mapping[str, Any] | None:
        """The extractor of the cache file, if there is one."""
        if self.cache is None or not locate(self.cache).is_file():
            return None
        return find_example(open_cache(follow_link(locate(self.cache))), ExtractConfig())

    def __sklearn_clone__(self) -> FeatureExtractor:
        """A clone that uses the same network, which is frozen, and tells the same listener, instead of copies."""
        plain = copy.copy(self)
        plain.backbone, plain.progress = ExtractConfig.backbone, None
        cloned: FeatureExtractor = super(FeatureExtractor, plain).__sklearn_clone__()
        return cloned.set_params(backbone=self.backbone, progress=self.progress)  # type: ignore[no-any-return]

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.three_d_array = True
        tags.input_tags.string = True
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags


def read_settings(parameters: dict[str, Any]) -> tuple[ExtractConfig, Backbone | None]:
    """A transformer's parameters as settings, and the backbone if that is one already.

    Raises
    ------
    SettingsError
        If one makes no sense.
    """
    plain = {
        name: freeze_list(value.tolist() if isinstance(value, np.ndarray) else value)
        for name, value in parameters.items()
    }
    if not isinstance(plain["backbone"], str | Backbone):
        kind = type(plain["backbone"]).__name__
        raise SettingsError(f"backbone is a {kind}: expected a name, or featcache.wrap_network(network, images)")
    plain["layer"] = (plain["layer"],) if isinstance(plain["layer"], str) else tuple(plain["layer"] or ())
    images = InputFormat.from_json({name: plain[name] for name in ExtractConfig.IMAGES})
    plain |= {name: getattr(images, name) for name in ExtractConfig.IMAGES}
    usual = vars(ExtractConfig())
    stated = {name: value for name, value in plain.items() if name in usual and value != usual[name]}
    settings, given = take_backbone({"backbone": usual["backbone"], **stated})
    return ExtractConfig(**settings), given


def provide_loaded(config: ExtractConfig, progress: Progress) -> Backbone:
    """The backbone that the settings name; the last ones stay in memory.

    The user's own code and files of whole networks are read anew each time, weights if their file is another one.
    """
    if config.backbone.startswith(("module:", "onnx:")):
        return provide_backbone(config, progress)
    key = (config.backbone, str(config.network_settings() | config.image_settings()), _look_at(config.weights))
    with TURN:
        if key not in _loaded:
            while len(_loaded) >= REMEMBERED:
                _loaded.popitem(last=False)
            _loaded[key] = provide_backbone(config, progress)
        _loaded.move_to_end(key)
        return _loaded[key]


def _look_at(weights: str) -> tuple[int, ...]:
    """What the file system says of a file of weights; nothing of a name or an address."""
    with contextlib.suppress(OSError):
        status = os.stat(weights)  # noqa: PTH116 - a Path would mend an address
        return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
    return ()
