"""featcache: frozen features in a cache, a linear head in milliseconds, and an honest comparison with fine-tuning.

Importing it loads nothing heavy; each public name is fetched from its module when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones import Backbone, list_backbones, load_backbone
    from featcache.bundle import Classifier, load_classifier
    from featcache.cache import FeatureCache, read_cache
    from featcache.dataset import Listing, list_dataset
    from featcache.errors import FeatcacheError
    from featcache.progress import Progress
    from featcache.runs import RunRecord, read_record
    from featcache.stages.compare import Comparison, compare, compare_runs
    from featcache.stages.download import download_dataset
    from featcache.stages.evaluate import Run
    from featcache.stages.extract import Extraction, extract_features
    from featcache.stages.finetune import finetune
    from featcache.stages.predict import Prediction, predict
    from featcache.stages.sample import make_sample
    from featcache.stages.show import show
    from featcache.stages.train_head import train_head

__version__ = "0.1.0"

_HOMES = {
    "Backbone": "backbones",
    "Classifier": "bundle",
    "Comparison": "stages.compare",
    "Extraction": "stages.extract",
    "FeatcacheError": "errors",
    "FeatureCache": "cache",
    "Listing": "dataset",
    "Prediction": "stages.predict",
    "Progress": "progress",
    "Run": "stages.evaluate",
    "RunRecord": "runs",
    "compare": "stages.compare",
    "compare_runs": "stages.compare",
    "download_dataset": "stages.download",
    "extract_features": "stages.extract",
    "finetune": "stages.finetune",
    "list_backbones": "backbones",
    "list_dataset": "dataset",
    "load_backbone": "backbones",
    "load_classifier": "bundle",
    "make_sample": "stages.sample",
    "predict": "stages.predict",
    "read_cache": "cache",
    "read_record": "runs",
    "show": "stages.show",
    "train_head": "stages.train_head",
}

__all__ = [
    "Backbone",
    "Classifier",
    "Comparison",
    "Extraction",
    "FeatcacheError",
    "FeatureCache",
    "Listing",
    "Prediction",
    "Progress",
    "Run",
    "RunRecord",
    "__version__",
    "compare",
    "compare_runs",
    "download_dataset",
    "extract_features",
    "finetune",
    "list_backbones",
    "list_dataset",
    "load_backbone",
    "load_classifier",
    "make_sample",
    "predict",
    "read_cache",
    "read_record",
    "show",
    "train_head",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"featcache.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
