"""Tar shards in webdataset's layout: found by the headers of their members, read by offset. Unpacks nothing.

Members with the same name up to the first dot of its last part are one sample: an image, and beside it `.cls` with the
class as a text, or `.json` with it under "label", "cls", "class" or "class_name". No other member is opened, whatever
it is called: no pickle, no array. A tar is as hostile as whoever made it: links, devices, names that lead elsewhere,
headers that lie and ends that are missing are told of, and nothing that a header says is taken for granted.
"""

from __future__ import annotations

import copy
import math
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from featcache.dataset.folders import DISK, IMAGE_EXTENSIONS
from featcache.dataset.hashing import RACY_NS, fold_stats
from featcache.dataset.listing import NO_STATS, SPLITS, STATS, Stats
from featcache.dataset.roots import COMPRESSED, KINDS, MAX_PATH, READERS, Found, Source, check_label, check_url, is_url
from featcache.errors import DatasetError, shorten
from featcache.tabular import read_json

BLOCK = tarfile.BLOCKSIZE
MAX_LABEL_BYTES = 65_536  # of a .cls or .json member
MAX_HEADER_BYTES = 1 << 20  # of a long name or an extended header
MAX_SHARDS = 100_000  # that a pattern may name
LABELS = (".cls", ".json")
JSON_LABELS = ("label", "cls", "class", "class_name")
MAGIC = {b"\x1f\x8b": "gunzip", b"\x28\xb5\x2f\xfd": "unzstd", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz"}
SPLIT_PREFIX = re.compile("(train|val|test)[-_.]")
PATTERN = re.compile(r"[{*]")
# What tarfile raises for files that are not what they seem.
DAMAGED = (tarfile.TarError, EOFError, ValueError, LookupError, OverflowError, RecursionError, UnicodeError)

Lister = Callable[[str], list[tuple[str, bool]]]  # names in a folder, each with whether it is a folder


@dataclass(frozen=True)
class Member:
    """Where a file lies in a tar.

    Attributes
    ----------
    name
        Without "./".
    offset, size
        Of its bytes.
    checksum
        Of its header, which lies before them.
    """

    name: str
    offset: int
    size: int
    checksum: int


@dataclass
class Sample:
    """What a tar has of one sample."""

    images: list[Member] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # images by the end of their names, under longer extensions
    labels: dict[str, str] = field(default_factory=dict)  # by extension


@dataclass(frozen=True)
class Shard:
    """A tar file, looked through.

    Attributes
    ----------
    samples
        Image and class of each sample, in the tar's order.
    ignored
        Names of other members.
    stamp
        What stood for the tar's bytes; empty if nothing proves that they are the same.
    is_settled
        Whether it had been left alone for a while.
    """

    samples: tuple[tuple[Member, str], ...]
    ignored: tuple[str, ...]
    stamp: tuple[int, ...]
    is_settled: bool


class Index:
    """Where the images of a shard lie, in little memory.

    Parameters
    ----------
    members
        N images.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        members = sorted(members, key=lambda member: os.fsencode(member.name))
        self._names = np.array([os.fsencode(member.name) for member in members], dtype=np.bytes_)
        self._values: NDArray[np.int64] = np.array(
            [(member.offset, member.size, member.checksum) for member in members], np.int64
        ).reshape(-1, 3)

    def find(self, name: str) -> Member | None:
        """Where an image lies, if it does."""
        wanted = np.bytes_(os.fsencode(name))
        i = int(np.searchsorted(self._names, wanted))
        if i == len(self._names) or self._names[i] != wanted:
            return None
        return Member(name, *self._values[i].tolist())

    def narrow(self, names: Sequence[str]) -> Index:
        """Where these images alone lie."""
        return Index([member for name in names if (member := self.find(name)) is not None])


class TarShards(Source):
    """Tar files as one data set.

    Parameters
    ----------
    pattern
        Path or URL of a tar, or of several: with {000..015}, {a,b} or *. Split by their folders train, val and test,
        or by names that begin so.
    """

    def __init__(self, pattern: str) -> None:
        if is_url(pattern):
            check_url(pattern)
        self.name = pattern
        self.address = pattern if is_url(pattern) else str(Path(pattern).absolute())
        self.readers = READERS if is_url(pattern) else 1
        self._base = find_base(self.address)
        self._shards: dict[str, str] | None = None  # split of each
        self._places: dict[str, Index] = {}
        self._stamps: dict[str, tuple[tuple[int, ...], bool]] = {}
        self._now: dict[str, tuple[int, ...]] = {}  # stamps as they were seen last

    def settle(self) -> Source:
        """The same, if all tars are there."""
        self.list_shards()
        return self

    def list_shards(self) -> dict[str, str]:
        """Each tar relative to the base, sorted, and the split that it belongs to; "" where contents will decide.

        Raises
        ------
        DatasetError
            If one is missing, or only some are of a split.
        """
        if self._shards is None:
            found = [path[len(self._base) :].lstrip("/") for path in expand_pattern(self.address)]
            self._shards = choose_splits(sorted(found), self.name)
        return self._shards

    def find(self) -> Found:
        """The images of all shards, each looked through once."""
        rows: dict[str, list[tuple[str, str]]] = {}
        ignored: list[str] = []
        shards = self.list_shards()
        with ThreadPoolExecutor(max(min(self.readers, len(shards)), os.cpu_count() or 1)) as pool:
            for (name, split), shard in zip(shards.items(), pool.map(self._look_through, shards), strict=True):
                rows.setdefault(split, []).extend((f"{name}/{member.name}", label) for member, label in shard.samples)
                ignored += [f"{name}/{other}" for other in shard.ignored]
        if not any(rows.values()):
            raise DatasetError(
                f"{self} has no images: expected members such as 0001.jpg and 0001.cls; `tar -tf` lists what is there"
            )
        return Found({name: rows[name] for name in ("", *SPLITS) if rows.get(name)}, ignored, by_number=True)

    def _look_through(self, name: str) -> Shard:
        address = self._name_shard(name)
        shard = read_shard(address)
        self._places[name] = Index([member for member, _ in shard.samples])
        self._stamps[name] = shard.stamp, shard.is_settled
        self._now[name] = shard.stamp
        return shard

    def narrow(self, paths: Sequence[str]) -> Source:
        """The same with the places of these images."""
        members: dict[str, list[str]] = {}
        for path in paths:
            shard, member = self._split_path(path)
            members.setdefault(shard, []).append(member)
        few, shards = copy.copy(self), self.list_shards()
        few._shards = {name: shards[name] for name in members}
        few._places = {name: self._places[name].narrow(members[name]) for name in members if name in self._places}
        few._stamps = {name: self._stamps[name] for name in members if name in self._stamps}
        few._now = {name: self._now[name] for name in members if name in self._now}
        return few

    def _name_shard(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _locate(self, path: str) -> tuple[str, Member]:
        """The shard and the place of an image. Raises an OSError if there is none."""
        shard, member = self._split_path(path)
        if shard not in self._places:
            try:
                self._look_through(shard)
            except DatasetError as error:
                raise OSError(str(error)) from error
        place = self._places[shard].find(member)
        if place is None:
            raise FileNotFoundError(f"{self._name_shard(shard)} has no {member}")
        return shard, place

    def _split_path(self, path: str) -> tuple[str, str]:
        """Shard and member of a row's path."""
        try:
            shards = self.list_shards()
        except DatasetError as error:
            raise OSError(str(error)) from error
        end = path.find(".tar/")
        while end >= 0:
            if (shard := path[: end + len(".tar")]) in shards:
                return shard, path[end + len(".tar/") :]
            end = path.find(".tar/", end + 1)
        raise FileNotFoundError(f"{path} is in none of the shards {self}")

    def read(self, path: str) -> bytes:
        """The bytes of an image; its header must still lie before them."""
        shard, place = self._locate(path)
        data = read_range(self._name_shard(shard), place.offset - BLOCK, place.offset + place.size)
        if len(data) != BLOCK + place.size or not is_header(data[:BLOCK], place):
            raise OSError(f"{self._name_shard(shard)} has changed; run the same command again")
        return data[BLOCK:]

    def look(self, paths: Sequence[str]) -> tuple[Stats, list[str]]:
        """What stands for N images: what stands for their tars, and where they lie in them."""
        stats: Stats = np.zeros((len(paths), len(STATS)), np.int64)
        reasons = [""] * len(paths)
        for i, path in enumerate(paths):
            try:
                shard, place = self._locate(path)
            except OSError as error:
                reasons[i] = f"cannot be read: {error.strerror or error}"
                continue
            if shard not in self._now:
                self._now[shard] = read_stamp(self._name_shard(shard))
            stats[i] = fold_place(self._now[shard], place)
        return stats, reasons

    def forget(self) -> None:
        """Look at the tars anew the next time."""
        self._now = {}

    def prove(self, path: str, data: bytes) -> tuple[int, ...]:
        """What will stand for an image, if its tar is the one that was looked through, and was not just written."""
        shard, place = self._locate(path)
        stamp, is_settled = self._stamps[shard]
        if not is_settled or len(data) != place.size:
            return NO_STATS
        return fold_place(stamp, place) if read_stamp(self._name_shard(shard)) == stamp else NO_STATS


def fold_place(stamp: tuple[int, ...], place: Member) -> tuple[int, ...]:
    """What stands for a member of a tar."""
    return fold_stats([list(stamp), place.offset, place.size], place.size) if any(stamp) else NO_STATS


def is_header(block: bytes, place: Member) -> bool:
    """Whether 512 bytes are the header of a member."""
    try:
        found = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.TarError:
        return False
    return (found.chksum, found.size) == (place.checksum, place.size)


# Which tars there are


def find_base(pattern: str) -> str:
    """The folder that all tars of a pattern lie below.

    >>> find_base("s3://bucket/a/x-{0..3}.tar"), find_base("/photos/{train,val}/*.tar"), find_base("/photos/a.tar")
    ('s3://bucket/a', '/photos', '/photos')
    """
    match = PATTERN.search(pattern)
    return pattern[: match.start() if match else len(pattern)].rpartition("/")[0]


def expand_pattern(pattern: str) -> list[str]:
    """The tars that a pattern names, each of which is there.

    Raises
    ------
    DatasetError
        If one is not.
    """
    from featcache.dataset import remote

    found: list[str] = []
    if not is_url(pattern) and remote.exists(pattern):  # whatever its name looks like
        return [pattern]
    for name in expand_braces(pattern):
        if "*" in name:
            found += list_matches(name)
        elif remote.exists(name):
            found.append(name)
        else:
            raise DatasetError(f"no tar at {name}: expected {KINDS}, found nothing")
    if not found:
        raise DatasetError(f"no tar is called {pattern}: expected {KINDS}, found nothing")
    if len(set(found)) < len(found):
        raise DatasetError(f"{pattern} names a tar twice: expected each once")
    return found


def expand_braces(pattern: str) -> list[str]:
    """What a shell makes of {000..015} and {a,b}.

    >>> expand_braces("{train,val}-{08..10}.tar")[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    pieces = re.split(r"(\{[^{}]*\})", pattern)
    choices = [expand_brace(piece) for piece in pieces]
    if math.prod(map(len, choices)) > MAX_SHARDS:
        raise DatasetError(f"{shorten(pattern)} names more than {MAX_SHARDS:,} tars: expected that many at most")
    return ["".join(parts) for parts in product(*choices)]


def expand_brace(piece: str) -> Sequence[str]:
    """The choices of one pair of braces; any other text is the only choice."""
    if match := re.fullmatch(r"\{([0-9]{1,18})\.\.([0-9]{1,18})\}", piece):
        first, last = int(match[1]), int(match[2])
        width = max(map(len, match.groups())) if any(re.match("0[0-9]", text) for text in match.groups()) else 0
        step = 1 if first <= last else -1
        if abs(last - first) >= MAX_SHARDS:
            raise DatasetError(f"{piece} names {abs(last - first) + 1} tars: expected {MAX_SHARDS:,} at most")
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    if piece.startswith("{") and piece.endswith("}") and "," in piece:
        return piece[1:-1].split(",")
    return [piece]


def list_matches(pattern: str) -> list[str]:
    """The tars in a folder whose names are like a pattern's last part.

    Raises
    ------
    DatasetError
        If there is a "*" before that, or no such folder.
    """
    folder, _, last = pattern.rpartition("/")
    if "*" in folder:
        raise DatasetError(f"{pattern} cannot be looked up: expected a * in the last part only")
    names = list_names(folder or ".")
    return [
        f"{folder}/{name}" for name, is_folder in names if not is_folder and is_shard(name) and fnmatchcase(name, last)
    ]


def list_names(folder: str) -> list[tuple[str, bool]]:
    """Names of what lies in a folder, here or at a URL, each with whether it is a folder."""
    from featcache.dataset import remote

    if is_url(folder):
        return remote.list_folder(folder)
    return [(entry.name, entry.is_folder) for entry in DISK.list(folder)]


def is_shard(name: str) -> bool:
    """Whether a file of this name is taken for a tar."""
    return name.lower().endswith(".tar") and not name.startswith(".")


def choose_shards(folder: str, list_names: Lister = list_names) -> str | None:
    """The pattern of the tars in a folder without folders of classes, or in its split folders; None if it has none.

    Raises
    ------
    DatasetError
        If there are compressed tars in their place.
    """
    names = list_names(folder)
    folders = [name for name, is_folder in names if is_folder and not name.startswith(".")]
    if _holds_shards(folder, names):
        return f"{folder}/*.tar"
    splits = [name for name in SPLITS if name in folders]
    if not splits or set(folders) - set(SPLITS):
        return None
    if all(_holds_shards(f"{folder}/{name}", list_names(f"{folder}/{name}")) for name in splits):
        return f"{folder}/{{{','.join(splits)}}}/*.tar" if len(splits) > 1 else f"{folder}/{splits[0]}/*.tar"
    return None


def _holds_shards(folder: str, names: list[tuple[str, bool]]) -> bool:
    """Whether there are tars, and no folders."""
    if any(is_folder and not name.startswith(".") for name, is_folder in names):
        return False
    if any(is_shard(name) for name, _ in names):
        return True
    if packed := [name for name, _ in names if name.lower().endswith(COMPRESSED)]:
        raise DatasetError(
            f"{folder} holds compressed tars, such as {packed[0]}: expected plain .tar files; unpack them, as `gunzip` "
            f"or `unzstd` do"
        )
    return False


def choose_splits(shards: Sequence[str], where: str) -> dict[str, str]:
    """The split of each tar by its folder, or by how its name begins.

    Raises
    ------
    DatasetError
        If only some say so, or none is for training.

    Examples
    --------
    >>> choose_splits(["train/0.tar", "val/0.tar"], "here"), choose_splits(["a.tar"], "here")
    ({'train/0.tar': 'train', 'val/0.tar': 'val'}, {'a.tar': ''})
    """
    splits = {shard: _read_split(shard) for shard in shards}
    there = set(splits.values())
    if "" in there and len(there) > 1:
        of_none = next(shard for shard, split in splits.items() if not split)
        raise DatasetError(
            f"{of_none} of {where} is of no split, as others are: expected names that begin with train-, val- or "
            f"test-, or none that does"
        )
    if there != {""} and "train" not in there:
        raise DatasetError(f"{where} has no tars to train on, only {', '.join(sorted(there))}: expected train and val")
    if "val" not in there:  # contents will decide who of the others validates
        splits = {shard: "" if split == "train" else split for shard, split in splits.items()}
    return splits


def _read_split(shard: str) -> str:
    parts = shard.split("/")
    if len(parts) > 1 and parts[-2] in SPLITS:
        return parts[-2]
    match = SPLIT_PREFIX.match(parts[-1])
    return match[1] if match else ""


# What is in one tar


class GuardedFile:
    """A file whose headers may be read, and not the gigabytes that a header may claim to be long."""

    def __init__(self, file: IO[bytes], address: str) -> None:
        self._file, self._address = file, address
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        """Some bytes."""
        if size > MAX_HEADER_BYTES or size < 0:
            raise DatasetError(f"{self._address} is no usable tar: a header of {size} bytes at byte {self.tell()}")
        return self._file.read(size)


def read_shard(address: str) -> Shard:
    """Look through the headers of a tar, and read its labels.

    Raises
    ------
    DatasetError
        If it is damaged, compressed, or holds what a data set does not.
    """
    from featcache.dataset import remote

    samples: dict[str, Sample] = {}
    ignored: list[str] = []
    started, stamp = time.time_ns(), read_stamp(address)
    try:
        with remote.open_binary(address) as file:
            check_plain(file.read(8), address)
            for member in iterate_members(file, address):
                take_member(member, file, samples, ignored, address)
    except OSError as error:
        raise DatasetError(f"{address} cannot be read: {error.strerror or error}") from error
    if read_stamp(address) != stamp:
        raise DatasetError(f"{address} changed while it was read; run the same command again")
    is_settled = any(stamp) and (is_url(address) or max(stamp[2:]) + RACY_NS < started)
    return Shard(tuple(pair_up(samples, ignored, address)), tuple(ignored), stamp, is_settled)


def check_plain(start: bytes, address: str) -> None:
    """Raise a DatasetError if the first bytes of a tar are those of a compressed one, or there are none."""
    if not start:
        raise DatasetError(f"{address} is empty: expected a tar")
    for magic, cure in MAGIC.items():
        if start.startswith(magic):
            raise DatasetError(f"{address} is compressed: expected a plain tar; unpack it with `{cure}`")


def iterate_members(file: IO[bytes], address: str) -> Iterator[Member]:
    """The regular files of a tar, in their order.

    Raises
    ------
    DatasetError
        If it is damaged, or holds anything but files and folders under sound names.
    """
    try:
        file.seek(0)
        with tarfile.open(fileobj=GuardedFile(file, address), mode="r:", errors="surrogateescape") as tar:  # type: ignore[call-overload]
            last = -1
            while (info := tar.next()) is not None:
                tar.members = []  # it would keep them all
                if info.offset <= last or info.size < 0:
                    raise tarfile.ReadError(f"a header at byte {info.offset} that leads backwards")
                last = info.offset
                if not info.isdir():
                    yield check_member(info, address)
            check_end(file, tar.offset)
    except DAMAGED as error:
        reason = str(error) or type(error).__name__
        raise DatasetError(
            f"{address} is damaged, or no tar ({reason}): expected a whole one; make it again"
        ) from error


def check_member(info: tarfile.TarInfo, address: str) -> Member:
    """A member as a plain file.

    Raises
    ------
    DatasetError
        If it is something else, or its name leads elsewhere.
    """
    name, shown = re.sub(r"^(\./+)+", "", info.name), f"{address}: {shorten(info.name)}"
    if not info.isreg() or info.issparse():
        kind = "a sparse file" if info.isreg() else "a link" if info.issym() or info.islnk() else "no file"
        raise DatasetError(
            f"{shown} is {kind}, expected plain files and folders; `tar --dereference --hard-dereference` writes such"
        )
    if name.startswith("/") or ".." in name.split("/") or "\0" in name or not name:
        raise DatasetError(f"{shown} leads out of the tar; expected names without / and ..")
    if len(os.fsencode(name)) > MAX_PATH:
        raise DatasetError(f"{shown} has a name too long for a file: expected {MAX_PATH:,} bytes at most")
    return Member(name, info.offset_data, info.size, info.chksum)


def check_end(file: IO[bytes], offset: int) -> None:
    """Raise an error if a tar ends where neither its mark nor the file's end is, or something comes after it."""
    file.seek(offset)
    rest = file.read(MAX_HEADER_BYTES)
    if rest.strip(b"\0"):
        zeros = len(rest) - len(rest.lstrip(b"\0"))
        raise tarfile.ReadError(
            f"something other than a header at byte {offset}" if zeros < BLOCK else "something after its end"
        )


def take_member(member: Member, file: IO[bytes], samples: dict[str, Sample], ignored: list[str], address: str) -> None:
    """Put a member where it belongs: to its sample, or to what is ignored."""
    key, extension = split_name(member.name)
    if any(part.startswith(".") for part in member.name.split("/")):
        ignored.append(member.name)
    elif extension in IMAGE_EXTENSIONS:
        samples.setdefault(key, Sample()).images.append(member)
    elif extension.endswith(IMAGE_EXTENSIONS):  # such as 0001.mask.png beside 0001.jpg
        samples.setdefault(key, Sample()).others.append(member.name)
        ignored.append(member.name)
    elif extension in LABELS:
        sample = samples.setdefault(key, Sample())
        if extension in sample.labels:
            raise DatasetError(f"{address}: {shorten(member.name)} is there twice; expected each sample once")
        if (label := read_label(file, member, extension, address)) is not None:
            sample.labels[extension] = label
    else:
        ignored.append(member.name)


def split_name(name: str) -> tuple[str, str]:
    """Key and extension of a member, by webdataset's rule: the first dot of the last part parts them.

    >>> split_name("train/0001.seg.PNG"), split_name("train.v2/0001")
    (('train/0001', '.seg.png'), ('train.v2/0001', ''))
    """
    folder, slash, last = name.rpartition("/")
    stem, dot, extension = last.partition(".")
    return folder + slash + stem, (dot + extension).lower()


def read_label(file: IO[bytes], member: Member, extension: str, address: str) -> str | None:
    """The class that a .cls or .json member names; None if a .json names none.

    Raises
    ------
    DatasetError
        If it is too large, or no text, or no JSON, or names no class.
    """
    where = f"{address}: {shorten(member.name)}"
    if member.size > MAX_LABEL_BYTES:
        raise DatasetError(f"{where} has {member.size:,} bytes: expected a label of {MAX_LABEL_BYTES:,} at most")
    file.seek(member.offset)
    try:
        text = file.read(member.size).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DatasetError(f"{where} is no UTF-8 text ({error.reason}); write it again") from error
    of_it = f"{address}: the label of {shorten(member.name)}"
    if extension == ".cls":
        return check_label(text.strip(), of_it)
    values = read_json(text, where)
    found = [values[name] for name in JSON_LABELS if name in values] if isinstance(values, dict) else []
    if not found:
        return None
    return check_label(found[0], of_it).strip()


def pair_up(samples: dict[str, Sample], ignored: list[str], address: str) -> Iterator[tuple[Member, str]]:
    """Image and label of each sample, in the tar's order.

    Raises
    ------
    DatasetError
        If one has several images, or no label.
    """
    for key, sample in samples.items():
        if sample.others and not sample.images:
            raise DatasetError(
                f"{address}: {shorten(sample.others[0])} has a dot within its name, with which its extension begins: "
                f"expected {shorten(key)}.jpg or the like; write the tar without such dots"
            )
        if not sample.images:
            ignored += [f"{key}{extension}" for extension in sample.labels]
            continue
        if len(sample.images) > 1:
            names = shorten(", ".join(member.name for member in sample.images))
            raise DatasetError(
                f"{address}: the sample {shorten(key)} has {len(sample.images)} images, {names}: expected one"
            )
        label = sample.labels.get(".cls", sample.labels.get(".json"))
        if label is None:
            raise DatasetError(
                f"{address}: {shorten(sample.images[0].name)} has no label: expected {shorten(key)}.cls beside it, or "
                f'the same with .json and "label" in it'
            )
        yield sample.images[0], label


# Bytes, and what stands for them


def read_stamp(address: str) -> tuple[int, ...]:
    """What stands for the bytes of a tar; zeros if nothing does."""
    from featcache.dataset import remote

    if is_url(address):
        return remote.look_at_url(address).stats
    try:
        status = os.stat(address)  # noqa: PTH116 - an address is a text
    except OSError:
        return NO_STATS
    return status.st_ino & (2**63 - 1), status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_range(address: str, start: int, stop: int) -> bytes:
    """Some bytes of a tar. Raises an OSError if they cannot be read."""
    from featcache.dataset import remote

    if is_url(address):
        return remote.read_url(address, start, stop)
    with open(address, "rb", buffering=0) as file:  # noqa: PTH123 - as above
        return os.pread(file.fileno(), stop - start, start)
