"""Features <-> HDF5: keys, parts, rows, the finished file, its lock and its neighbours. The only owner of h5py.

Knows no network and no image: rows are keyed by digests, the extractor is a JSON description.

::

    features.h5
    ├── attrs   featcache_schema   2
    │           classes            JSON list of names; a label is an index into it
    │           extractor          JSON: backbone, weights and their SHA-256, layer, preprocessing, precision; of
    │                              imported features "imported", the table and its SHA-256, and no preprocessing
    │           extractor_key      SHA-256 of what decides the features
    │           provenance         JSON: data folder, versions, device, what extracting cost, files left out
    │           columns_sha256     JSON: SHA-256 of every column below
    │           content_sha256     SHA-256 of classes, key and columns but `stats`: equal caches have equal ones
    │           attributes_sha256  SHA-256 of those six
    │           views              JSON, only where there are some: random views of each training image and of each
    │                              other one, their seed and recipe; its SHA-256 is among columns_sha256
    ├── train/  features         (N, D) float32 or float16, in one piece: can be memory-mapped
    │           features_sha256  (N / 4096,) 64 bytes, SHA-256 of every 4,096 rows of features, in hexadecimal
    │           views            (N, K, D) as features, only where there are some: of K random views of each image
    │           views_sha256     (N / (4096 // K),) 64 bytes, SHA-256 of the views of every 4096 // K images
    │           labels           (N,)   int64
    │           paths            (N,)   bytes, file names as the system has them, relative to the data folder
    │           digests          (N,)   64 bytes, SHA-256 of each image file in hexadecimal
    │           stats            (N, 4) int64, what the file system said of the file, see `dataset.KnownFiles`
    ├── val/    the same
    └── test/   the same, where there is one

    features.h5.parts/             while an extraction runs, or after it could not finish
    ├── rows-<key>-<sha256>.h5     some rows: features and digests of one extractor
    ├── files-<sha256>.h5          some files that were hashed: digests and stats
    └── job-, done-, bad-...json   only where several processes work on it, see `jobs`
    features.h5.lock               while an extraction runs: who does it

    photos.json                    an index: several caches that read as one

A stranger needs no featcache to read it: ``h5py.File("features.h5")["train/features"][:]``.

=========  ===================================================================================================
key        what decides the features, as a digest; what differs between two extractors
contents   FeatureCache: what a cache holds, in memory or mapped
reading    one file -> FeatureCache, as careful with strangers' files as with damaged ones; verify
index      the small file that names several caches
opening    the way in for whoever reads a cache, be it one file or an index of several
joining    rows and texts of several places as one column
streaming  features that stay on the disk, read when they are wanted
writing    FeatureCache -> file, streamed, without ever holding all rows
parts      immutable files of finished work, from which an extraction goes on
jobs       what several processes that extract into one file tell each other
rows       rows of many files as one table, found by the digests of their images
lock       one extraction at a time into one file
tidying    what caches and leftovers lie in a folder, and their removal
=========  ===================================================================================================
"""

from featcache.cache.contents import SCHEMA, STORED_TYPES, FeatureCache, FeatureSplit, stored_precision
from featcache.cache.index import is_index, list_members
from featcache.cache.jobs import Job, drop_jobs, keep_bad, keep_done, keep_job, list_done, list_jobs, read_bad
from featcache.cache.joining import JoinedRows
from featcache.cache.key import (
    Field,
    can_serve,
    compare_fields,
    describe_differences,
    hash_extractor,
    key_parts,
    list_differences,
    name_network,
    shorten,
    spell_out,
)
from featcache.cache.lock import hold_output
from featcache.cache.opening import (
    index_caches,
    is_feature_cache,
    open_cache,
    open_old,
    open_readers,
    read_cache,
    stream_cache,
    verify_cache,
)
from featcache.cache.parts import (
    Part,
    PartWriter,
    check_parts,
    keep_files,
    list_parts,
    make_known_files,
    merge_parts,
    parts_path,
    read_known_files,
    remove_parts,
    remove_temporary,
)
from featcache.cache.reading import CacheReader, Verification, check_complete
from featcache.cache.rows import DigestTable, GatheredRows, PartSource, RowTable, Source, open_sources
from featcache.cache.streaming import StreamedFeatures
from featcache.cache.tidying import Item, describe_item, list_items, list_near, remove_item
from featcache.cache.writing import estimate_bytes, write_cache

__all__ = [
    "SCHEMA",
    "STORED_TYPES",
    "CacheReader",
    "DigestTable",
    "FeatureCache",
    "FeatureSplit",
    "Field",
    "GatheredRows",
    "Item",
    "Job",
    "JoinedRows",
    "Part",
    "PartSource",
    "PartWriter",
    "RowTable",
    "Source",
    "StreamedFeatures",
    "Verification",
    "can_serve",
    "check_complete",
    "check_parts",
    "compare_fields",
    "describe_differences",
    "describe_item",
    "drop_jobs",
    "estimate_bytes",
    "hash_extractor",
    "hold_output",
    "index_caches",
    "is_feature_cache",
    "is_index",
    "keep_bad",
    "keep_done",
    "keep_files",
    "keep_job",
    "key_parts",
    "list_differences",
    "list_done",
    "list_items",
    "list_jobs",
    "list_members",
    "list_near",
    "list_parts",
    "make_known_files",
    "merge_parts",
    "name_network",
    "open_cache",
    "open_old",
    "open_readers",
    "open_sources",
    "parts_path",
    "read_bad",
    "read_cache",
    "read_known_files",
    "remove_item",
    "remove_parts",
    "remove_temporary",
    "shorten",
    "spell_out",
    "stored_precision",
    "stream_cache",
    "verify_cache",
    "write_cache",
]
