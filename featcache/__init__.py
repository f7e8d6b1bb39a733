"""featcache: frozen features in a cache, a linear head in milliseconds, and an honest comparison with fine-tuning.

Importing it loads nothing heavy; each public name is fetched from its module when it is first used (PEP 562).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featcache.backbones import Backbone, list_backbones, load_backbone, wrap_network
    from featcache.bundle import Classifier, load_classifier
    from featcache.cache import FeatureCache, Verification, index_caches, open_cache, read_cache, verify_cache
    from featcache.dataset import Listing, list_dataset
    from featcache.errors import FeatcacheError
    from featcache.preprocessing import InputFormat
    from featcache.progress import Progress
    from featcache.runs import RunRecord, read_record
    from featcache.stages.audit import Audit, audit
    from featcache.stages.compare import Comparison, compare, compare_runs
    from featcache.stages.download import download_dataset
    from featcache.stages.evaluate import Run
    from featcache.stages.explain import Explanation, explain_cache
    from featcache.stages.extract import Extraction, extract_features
    from featcache.stages.feature_extractor import FeatureExtractor
    from featcache.stages.finetune import finetune
    from featcache.stages.forecast import Forecast, forecast_extraction
    from featcache.stages.import_features import ImportedFeatures, import_features
    from featcache.stages.merge import merge_shards
    from featcache.stages.plan import Plan
    from featcache.stages.plan_comparison import ComparisonPlan, plan_comparison
    from featcache.stages.predict import Prediction, predict
    from featcache.stages.rank import Ranking, rank_backbones, rank_caches
    from featcache.stages.sample import make_sample
    from featcache.stages.share import ShardExtraction, extract_shard
    from featcache.stages.show import show
    from featcache.stages.train_head import train_head

__version__ = "0.1.0"

_HOMES = {
    "Audit": "stages.audit",
    "Backbone": "backbones",
    "Classifier": "bundle",
    "Comparison": "stages.compare",
    "ComparisonPlan": "stages.plan_comparison",
    "Explanation": "stages.explain",
    "Extraction": "stages.extract",
    "FeatcacheError": "errors",
    "FeatureCache": "cache",
    "FeatureExtractor": "stages.feature_extractor",
    "Forecast": "stages.forecast",
    "ImportedFeatures": "stages.import_features",
    "InputFormat": "preprocessing",
    "Listing": "dataset",
    "Plan": "stages.plan",
    "Prediction": "stages.predict",
    "Progress": "progress",
    "Ranking": "stages.rank",
    "Run": "stages.evaluate",
    "RunRecord": "runs",
    "ShardExtraction": "stages.share",
    "Verification": "cache",
    "audit": "stages.audit",
    "compare": "stages.compare",
    "compare_runs": "stages.compare",
    "download_dataset": "stages.download",
    "explain_cache": "stages.explain",
    "extract_features": "stages.extract",
    "extract_shard": "stages.share",
    "finetune": "stages.finetune",
    "forecast_extraction": "stages.forecast",
    "import_features": "stages.import_features",
    "index_caches": "cache",
    "list_backbones": "backbones",
    "list_dataset": "dataset",
    "load_backbone": "backbones",
    "load_classifier": "bundle",
    "make_sample": "stages.sample",
    "merge_shards": "stages.merge",
    "open_cache": "cache",
    "plan_comparison": "stages.plan_comparison",
    "predict": "stages.predict",
    "rank_backbones": "stages.rank",
    "rank_caches": "stages.rank",
    "read_cache": "cache",
    "read_record": "runs",
    "show": "stages.show",
    "train_head": "stages.train_head",
    "verify_cache": "cache",
    "wrap_network": "backbones",
}

__all__ = [
    "Audit",
    "Backbone",
    "Classifier",
    "Comparison",
    "ComparisonPlan",
    "Explanation",
    "Extraction",
    "FeatcacheError",
    "FeatureCache",
    "FeatureExtractor",
    "Forecast",
    "ImportedFeatures",
    "InputFormat",
    "Listing",
    "Plan",
    "Prediction",
    "Progress",
    "Ranking",
    "Run",
    "RunRecord",
    "ShardExtraction",
    "Verification",
    "__version__",
    "audit",
    "compare",
    "compare_runs",
    "download_dataset",
    "explain_cache",
    "extract_features",
    "extract_shard",
    "finetune",
    "forecast_extraction",
    "import_features",
    "index_caches",
    "list_backbones",
    "list_dataset",
    "load_backbone",
    "load_classifier",
    "make_sample",
    "merge_shards",
    "open_cache",
    "plan_comparison",
    "predict",
    "rank_backbones",
    "rank_caches",
    "read_cache",
    "read_record",
    "show",
    "train_head",
    "verify_cache",
    "wrap_network",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"featcache.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
