"""Labelled images or clips as a listing: paths, labels, classes, splits, digests. Decodes nothing.

Of folders, here or on an object store, two layouts are understood, both ImageFolder's::

    DATA/train/<class>/*   DATA/val/<class>/*   [DATA/test/<class>/*]
    DATA/<class>/*         split here, by content

Of images each file is a sample. Of clips it is each video file, and each folder of frames: one that lies somewhere in
its class folder and directly holds image files, which are its frames in natural order (frame2 before frame10). What
else a data set may be says `roots`.

=========  ===================================================================================================
roots      what paths are relative to: a local folder, or a source that is none
texts      paths and digests by the million: packed, or left in their file
listing    what a data set is: samples with labels, classes, splits and digests; what a person should know of it
folders    folders of classes -> the names of their images, or clips
hashing    files -> digests, read only where the file system does not say that they are as they were
splitting  which images train and which validate, decided by their contents
remote     files at URLs, by fsspec
tars       tar shards in webdataset's layout
lists      CSV, JSONL and Parquet lists of images
hub        data sets of the package `datasets`
samples    a data set's samples, first by name, then with what is in them
=========  ===================================================================================================
"""

from featcache.dataset.folders import (
    CLIP_EXTENSIONS,
    IMAGE_EXTENSIONS,
    VIDEO_EXTENSIONS,
    is_clip_name,
    is_image_name,
    list_clips,
    list_frames,
    list_images,
)
from featcache.dataset.hashing import NOTHING_KNOWN, RACY_NS, KnownFiles, hash_clip, hash_files
from featcache.dataset.listing import (
    SPLITS,
    STATS,
    Digests,
    Listing,
    Split,
    Stats,
    check_classes_filled,
    dataset_fingerprint,
    describe_data,
    find_shared_images,
    list_doubts,
    summarise,
)
from featcache.dataset.roots import (
    Files,
    Item,
    ReadOnce,
    Root,
    Source,
    check_root,
    find_common_folder,
    is_url,
    name_root,
    names_source,
    open_root,
    parse_root,
    reopen_root,
)
from featcache.dataset.samples import (
    Names,
    Samples,
    find_known_digests,
    find_samples,
    hash_groups,
    hash_samples,
    list_changed,
    list_dataset,
)
from featcache.dataset.splitting import hold_out, is_validation, split_by_content

__all__ = [
    "CLIP_EXTENSIONS",
    "IMAGE_EXTENSIONS",
    "NOTHING_KNOWN",
    "RACY_NS",
    "SPLITS",
    "STATS",
    "VIDEO_EXTENSIONS",
    "Digests",
    "Files",
    "Item",
    "KnownFiles",
    "Listing",
    "Names",
    "ReadOnce",
    "Root",
    "Samples",
    "Source",
    "Split",
    "Stats",
    "check_classes_filled",
    "check_root",
    "dataset_fingerprint",
    "describe_data",
    "find_common_folder",
    "find_known_digests",
    "find_samples",
    "find_shared_images",
    "hash_clip",
    "hash_files",
    "hash_groups",
    "hash_samples",
    "hold_out",
    "is_clip_name",
    "is_image_name",
    "is_url",
    "is_validation",
    "list_changed",
    "list_clips",
    "list_dataset",
    "list_doubts",
    "list_frames",
    "list_images",
    "name_root",
    "names_source",
    "open_root",
    "parse_root",
    "reopen_root",
    "split_by_content",
    "summarise",
]
