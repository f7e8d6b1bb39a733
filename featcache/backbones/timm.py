"""Backbones from timm, "timm:NAME" or "timm:NAME.TAG": its networks, its weights from the hub, its preprocessing.

Source: https://huggingface.co/docs/timm. Needs the extra featcache[timm].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from featcache.backbones.base import WeightsEntry, WeightsFile
from featcache.backbones.structure import ParametersOnMeta, forward_shape
from featcache.errors import BackboneError, WeightsUnavailableError
from featcache.extras import import_extra
from featcache.fetching import check_reachable
from featcache.files import hash_file
from featcache.preprocessing import InputFormat
from featcache.progress import Progress

PUBLISHED_LICENCES = {None: "not stated", "unknown": "not stated"}


def import_timm() -> ModuleType:
    """The package, or a MissingExtraError."""
    return import_extra("timm", extra="timm", what="backbones timm:NAME need")


def list_names() -> list[str]:
    """Names of all networks, without tags."""
    return list(import_timm().list_models())


def has_name(name: str) -> bool:
    """Whether there is such a network, with or without a tag."""
    timm, (network, _, tag) = import_timm(), name.partition(".")
    return bool(timm.is_model(network)) and (not tag or name in timm.models.get_arch_pretrained_cfgs(network))


def list_weights(name: str) -> list[WeightsEntry]:
    """The tags of a network, or the one that its name has, the default one first."""
    timm = import_timm()
    network, _, tag = name.partition(".")
    tags = [one.partition(".")[2] for one in timm.models.get_arch_pretrained_cfgs(network)]
    names = [tag] if tag else tags
    entries = []
    for one in names:
        config = timm.models.get_pretrained_cfg(f"{network}.{one}" if one else network)
        if config is None or not config.has_weights:
            continue
        entries.append(
            WeightsEntry(
                name=one or "default",
                licence=PUBLISHED_LICENCES.get(config.license, config.license),
                is_here=_find_cached(config) is not None,
            )
        )
    return entries


def list_options(name: str, entry: str | None) -> dict[str, Any]:
    """None: timm's builder needs the name alone."""
    del name, entry
    return {}


def make_network(name: str, options: Mapping[str, Any]) -> nn.Module:
    """The network with its classifier; without it where the classifier is more than one layer at the end."""
    timm = import_timm()
    return _keep_simple_classifier(timm.create_model(name, pretrained=False, **options), name)


def describe_input(name: str, entry: str | None, network: nn.Module) -> InputFormat:
    """What timm's own evaluation transform does for these weights.

    Raises
    ------
    BackboneError
        If it does what `Preprocessing` cannot say.
    """
    del network
    timm, config = import_timm(), _find_config(name, entry)
    data = timm.data.resolve_data_config(pretrained_cfg=config.to_dict() if config else {})
    mode, (channels, height, width) = data["crop_mode"], data["input_size"]
    scaled = (math.floor(height / data["crop_pct"]), math.floor(width / data["crop_pct"]))
    if mode not in ("center", "squash") or (mode == "center" and scaled[0] != scaled[1]):
        raise BackboneError(f"timm:{name} wants its images {mode} at {height} x {width}, which featcache cannot do")
    return InputFormat(
        input_size=(height, width),
        resize=scaled[0] if mode == "center" else scaled,
        interpolation=data["interpolation"],
        channels={1: "L", 3: "RGB"}[channels],
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        scale=1.0,
    )


def read_weights(name: str, entry: str, progress: Progress) -> WeightsFile:
    """The weights of a tag, as timm loads and verifies them, from its cache or the hub.

    Raises
    ------
    WeightsUnavailableError
        If they cannot be had.
    """
    import huggingface_hub

    timm, tagged, config = import_timm(), _tag(name, entry), _find_config(name, entry)
    is_here, constants = _find_cached(config) is not None, huggingface_hub.constants
    huggingface_hub.utils.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it remarks on each try
    try:
        if not is_here and not constants.HF_HUB_OFFLINE:
            progress.say(f"downloading the weights of timm:{tagged}")
            check_reachable(constants.ENDPOINT)
        network = timm.create_model(tagged, pretrained=True)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsUnavailableError(
            f"the weights of timm:{tagged} cannot be had ({reason}); name a file with --weights PATH; --weights none "
            f"is random"
        ) from error
    network = _keep_simple_classifier(network, tagged)
    path = _find_cached(config)
    paths = None if path is None else (path, *_find_reference(path))
    return WeightsFile(network.state_dict(), f"timm:{tagged}", hash_file(path) if path else "", paths)


def list_heads(network: nn.Module) -> tuple[str, ...]:
    """Names of the classifiers of a network that timm made with more than one; its weights have them, it does not.

    A network of anybody else has none.
    """
    config = getattr(network, "default_cfg", None)
    heads = config.get("classifier") if isinstance(config, Mapping) else None
    return tuple(heads) if isinstance(heads, tuple | list) else ()


def name_classifier(network: nn.Module) -> str | None:
    """Dotted name of the classifier of a network of timm's, "" if it has none; None of a network of anybody else."""
    config = getattr(network, "default_cfg", None)
    if not isinstance(config, Mapping) or "classifier" not in config:
        return None
    name = config["classifier"]
    if not isinstance(name, str) or not name:
        return ""
    try:
        return "" if isinstance(network.get_submodule(name), nn.Identity) else name
    except AttributeError:
        return ""


def _keep_simple_classifier(network: Any, name: str) -> nn.Module:
    """The network without its classifier, if that is more than one layer; timm then gives the features itself."""
    timm, classifier = import_timm(), name_classifier(network)
    with ParametersOnMeta():
        headless = timm.create_model(name, pretrained=False, num_classes=0).eval()
    features = forward_shape(headless, tuple(network.default_cfg["input_size"]), where=f"timm:{name}")
    layer = network.get_submodule(classifier) if classifier else None
    width = getattr(layer, "in_features", None) or getattr(layer, "in_channels", None)
    if width != features.shape[1]:
        network.reset_classifier(0)
    made: nn.Module = network
    return made


def _tag(name: str, entry: str | None) -> str:
    return name if "." in name or entry in (None, "default") else f"{name}.{entry}"


def _find_config(name: str, entry: str | None) -> Any:
    return import_timm().models.get_pretrained_cfg(_tag(name, entry))


def _find_cached(config: Any) -> Path | None:
    """Where the weights lie on this machine, if they do."""
    import torch
    from huggingface_hub import try_to_load_from_cache

    if config.hf_hub_id:
        for file in ("model.safetensors", "pytorch_model.bin", config.hf_hub_filename):
            if file and isinstance(path := try_to_load_from_cache(config.hf_hub_id, file), str):
                return Path(path)
    if config.url:
        path = Path(torch.hub.get_dir()) / "checkpoints" / config.url.rpartition("/")[2]
        return path if path.is_file() else None
    return None


def _find_reference(path: Path) -> tuple[Path, ...]:
    """The file in the hub's cache that says which revision is the present one; of a download from elsewhere none."""
    revision = path.parent
    return (revision.parents[1] / "refs" / "main",) if revision.parent.name == "snapshots" else ()
