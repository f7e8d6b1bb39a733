"""State dicts from files, nothing in them executed, and their fit to a network. Knows no particular network."""

from __future__ import annotations

import re
import tarfile
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from featcache.backbones.base import StateDict, WeightsFile
from featcache.errors import DownloadError, OutputError, WeightsError, WeightsUnavailableError, make_printable
from featcache.fetching import check_url, fetch_file, hide_credentials
from featcache.files import hash_file
from featcache.progress import SILENT, Progress

# Where a training checkpoint has its state dict, the first that is there. Averaged weights only where there are no
# others: what was reported of a checkpoint is not always said to be of them.
ENTRIES = ("state_dict", "model", "model_state_dict", "net", "state_dict_ema", "model_ema")
# What wrappers put before every name: DataParallel, torch.compile, Lightning, and networks around a backbone.
PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")
SAVE_TENSORS = (
    'where you trust the file, save its tensors alone: torch.save(checkpoint["state_dict"], PATH), or '
    "torch.save(network.state_dict(), PATH) of a whole network"
)


class RefusedError(Exception):
    """What a file holds is not taken; the message is the reason."""


def read_weights(path: Path) -> WeightsFile:
    """Read named tensors from safetensors, from any file that torch.save wrote, or from a training checkpoint in one.

    What the file is, its content says. Of a checkpoint, the first of `ENTRIES` that it has is taken, and the name of
    the result says which; all else in it is left alone.

    Raises
    ------
    WeightsError
        If there is no such file, or it holds anything but tensors and plain values.
    """
    if not path.is_file():
        raise WeightsError(
            f"no weights at {path}: expected default, none, or the path of a state dict (.pth or .safetensors)"
        )
    try:
        tensors, entry = _read_tensors(path)
    except RefusedError as error:
        raise WeightsError(f"cannot read weights from {path}: {make_printable(str(error))}") from error
    except Exception as error:
        reason = " ".join([type(error).__name__, *str(error).splitlines()[:1]])
        raise WeightsError(
            f"cannot read weights from {path}: {make_printable(reason)}; expected a state dict of tensors, saved with "
            f"torch.save(network.state_dict(), ...) or safetensors, and nothing in it is ever executed"
        ) from error
    return WeightsFile(tensors, f"{path.name} ({entry})" if entry else path.name, hash_file(path), (path.absolute(),))


def is_url(text: str) -> bool:
    """Whether somebody gave an address, not a path.

    >>> is_url("https://example.org/w.pth"), is_url("C:/w.pth"), is_url("w.pth")
    (True, False, False)
    """
    return re.match("[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def fetch_weights(text: str, progress: Progress = SILENT) -> WeightsFile:
    """Download weights once and read them.

    Parameters
    ----------
    text
        The address, and after it `#sha256=` and 64 hexadecimal digits: "https://example.org/w.pth#sha256=...".
    progress
        Told of the download.

    Raises
    ------
    WeightsError
        If no digest is given, or what was downloaded is not weights.
    WeightsUnavailableError
        If they are not on this machine and cannot be downloaded.
    """
    url, _, fragment = text.partition("#")
    try:
        check_url(url)
    except DownloadError as error:
        raise WeightsError(str(error)) from error
    if not (stated := re.fullmatch("sha256=([0-9a-fA-F]{64})", fragment)):
        raise WeightsError(
            f"{make_printable(hide_credentials(url))} needs #sha256= and 64 hexadecimal digits after it, as its "
            f"publisher states them or `sha256sum` of a copy that you trust: without, nobody could tell other weights "
            f"from these"
        )
    path = name_download(url, stated[1].lower())
    try:
        fetch_file(url, path, sha256=stated[1], progress=progress)
    except (DownloadError, OutputError) as error:
        if path.exists():  # something else has its name
            raise WeightsError(str(error)) from error
        raise WeightsUnavailableError(f"{error}; or fetch it by hand and give its path") from error
    return read_weights(path)


def find_downloads() -> Path:
    """The folder where torch, torchvision and featcache keep what they download."""
    return Path(torch.hub.get_dir()) / "checkpoints"


def name_download(url: str, sha256: str) -> Path:
    """Where the weights from an address are kept: under their name there, and the first digits of what they are.

    >>> name_download("https://example.org/a/my%20net.pth?download=1", "0123456789abcdef").name
    'my_net-01234567.pth'
    """
    name = re.sub("[^A-Za-z0-9._+-]", "_", PurePosixPath(unquote(urlsplit(url).path)).name).lstrip(".") or "weights"
    stem, suffix = PurePosixPath(name).stem, PurePosixPath(name).suffix
    return find_downloads() / f"{stem[:100]}-{sha256[:8]}{suffix[:20]}"


def fit_weights(
    network: nn.Module, tensors: StateDict, *, where: str, replaced: str = "", ignored: Sequence[str] = ()
) -> bool:
    """Put tensors into a network, its classifier aside: that one may be there, missing, or of another size.

    Prefixes that wrappers put before all names are left out.

    Parameters
    ----------
    network
        Gets them.
    tensors
        By the network's names.
    where
        What the user calls them.
    replaced
        Dotted name of the classifier, if there is one.
    ignored
        Names of modules that a file may hold and the network has no use for.

    Returns
    -------
    Whether the classifier's tensors were there and fitted; otherwise it keeps its own.

    Raises
    ------
    WeightsError
        Naming the first tensor that is missing, unexpected, or of the wrong shape.
    """
    wanted = network.state_dict()
    tensors = strip_prefixes(tensors, wanted)
    prefixes = tuple(f"{name}." for name in (replaced, *ignored) if name)
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefixes)}
    kept = {name: tensor for name, tensor in wanted.items() if name.startswith(prefixes)}
    whole = all(name in tensors and tensors[name].shape == tensor.shape for name, tensor in kept.items())
    if whole:
        kept = {name: tensors[name] for name in kept}
    for name, tensor in given.items():
        if tensor.layout != torch.strided or tensor.is_complex() or tensor.is_quantized or tensor.is_meta:
            raise WeightsError(
                f"weights from {where} do not fit: tensor {name} is {_describe_kind(tensor)}, expected numbers"
            )
    for name, tensor in wanted.items():
        if name in kept:
            continue
        if name not in given:
            if name.endswith("num_batches_tracked"):  # files from before torch 0.4.1 lack it, and nothing uses it
                given[name] = tensor
                continue
            raise WeightsError(
                f"weights from {where} do not fit: tensor {name} {tuple(tensor.shape)} is missing; "
                f"are they of another network?"
            )
        if given[name].shape != tensor.shape:
            raise WeightsError(
                f"weights from {where} do not fit: tensor {name} is {tuple(given[name].shape)}, expected "
                f"{tuple(tensor.shape)}; are they of another network?"
            )
    if extra := sorted(set(given) - set(wanted)):
        raise WeightsError(
            f"weights from {where} do not fit: tensor {extra[0]} {tuple(given[extra[0]].shape)} has no place in the "
            f"network; are they of another one?"
        )
    load_tensors(network, {**given, **kept})
    return whole


def _describe_kind(tensor: Tensor) -> str:
    """What a tensor is that is not plain numbers."""
    if tensor.is_meta:
        return "without values"
    return "quantised" if tensor.is_quantized else "complex" if tensor.is_complex() else "sparse"


def load_tensors(network: nn.Module, tensors: StateDict) -> None:
    """`load_state_dict` for tensors from any container: as those of the network's present version.

    torch keeps a version of each module beside the tensors, which safetensors does not have and MNASNet asks for.

    Raises
    ------
    RuntimeError
        If they do not fit.
    """
    versioned = OrderedDict(tensors)
    versioned._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
    network.load_state_dict(versioned)


def strip_prefixes(tensors: StateDict, wanted_names: Collection[str]) -> StateDict:
    """Leave out what wrappers put before all names, as far as that makes more of them wanted.

    A prefix that only some of the names have belongs to them and stays.

    Examples
    --------
    >>> sorted(strip_prefixes({"module.model.a": 1, "module.model.b": 2}, {"a", "b"}))
    ['a', 'b']
    >>> sorted(strip_prefixes({"model.a": 1, "fc.b": 2}, {"a", "b"}))
    ['fc.b', 'model.a']
    """
    wanted = set(wanted_names)
    if "n_averaged" not in wanted:  # the count of torch's AveragedModel, beside the network
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
    best = stripped = tensors
    while prefix := _find_common_prefix(stripped):
        stripped = {name[len(prefix) :]: tensor for name, tensor in stripped.items()}
        if len(wanted & set(stripped)) > len(wanted & set(best)):
            best = stripped
    return best


def _find_common_prefix(tensors: StateDict) -> str | None:
    return next((prefix for prefix in PREFIXES if tensors and all(name.startswith(prefix) for name in tensors)), None)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a file, and the entry of a checkpoint where they were."""
    if _is_safetensors(path):
        return load_file(path), None
    if path.suffix == ".safetensors":
        raise RefusedError("it is no safetensors file, or one that is cut short")
    if _is_torchscript(path):
        raise RefusedError(
            "it is a TorchScript archive, which holds code; where you trust it, save its tensors alone: "
            "torch.save(torch.jit.load(FILE).state_dict(), PATH)"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch remarks on odd files in several lines; what matters is raised
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise RefusedError(_explain_refusal(path, str(error))) from error
    return find_state_dict(loaded)


def find_state_dict(loaded: Any) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in what torch.load gave, and the name of its entry if that is a checkpoint.

    Raises
    ------
    RefusedError
        If there is none.
    """
    expected = "expected a state dict of tensors, or a checkpoint that has one as"
    if not isinstance(loaded, Mapping) or not loaded:
        found = "nothing" if isinstance(loaded, Mapping) else type(loaded).__name__
        raise RefusedError(f"it holds {found}, {expected} {', '.join(ENTRIES)}")
    if all(isinstance(value, Tensor) for value in loaded.values()):
        return {str(name): value for name, value in loaded.items()}, None
    entry = next((name for name in ENTRIES if isinstance(loaded.get(name), Mapping) and loaded[name]), None)
    state = loaded if entry is None else loaded[entry]
    for name, value in state.items():
        if not isinstance(value, Tensor):
            where = f" of {entry}" if entry else ""
            raise RefusedError(
                f"entry {name!r}{where} is {type(value).__name__}, not a tensor; {expected} {', '.join(ENTRIES)}"
            )
    return {str(name): value for name, value in state.items()}, entry


def _is_safetensors(path: Path) -> bool:
    """Whether a file begins like safetensors: the length of a header that fits into it, and JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") <= path.stat().st_size - 8


def _is_torchscript(path: Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any(name.endswith("/constants.pkl") or "/code/" in name for name in archive.namelist())


def _explain_refusal(path: Path, message: str) -> str:
    """Why torch.load refused a file, without its advice to run what is in it."""
    if _is_tar(path):
        return f"it is a tar archive, which cannot be read without running what is in it; {SAVE_TENSORS}"
    refused = re.search(r"GLOBAL (\S+)", message)
    if refused and "is blocked" in message:
        return f"it would run {refused[1]}, which no weights need; do not trust it. Nothing was run"
    if refused and _holds_network(path):
        return (
            f"it is a whole pickled network ({refused[1]}), and unpickling it would run code; where you trust the "
            f"file, save its tensors alone: torch.save(network.state_dict(), PATH)"
        )
    if refused:
        return f"it pickles {refused[1]} beside tensors, and unpickling that could run code; {SAVE_TENSORS}"
    return (
        "it is damaged, or no state dict of tensors, as torch.save(network.state_dict(), ...) or safetensors write "
        "one; nothing in it is ever executed"
    )


def _is_tar(path: Path) -> bool:
    """Whether a file is a plain tar archive, which torch before 0.1.10 wrote."""
    try:
        with tarfile.open(path, "r:"):
            return True
    except tarfile.TarError:
        return False


def _holds_network(path: Path) -> bool:
    """Whether a pickle has the attributes that every torch module has."""
    content = path.read_bytes()
    return all(len(name).to_bytes(4, "little") + name in content for name in (b"_parameters", b"_modules"))
