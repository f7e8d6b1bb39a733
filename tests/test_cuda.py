"""What a GPU computes is what a CPU computes; skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TinyFamily
from safetensors.torch import load_file
from test_finetune import interrupt_after

import featcache
from featcache.config import HeadConfig
from featcache.files import hash_file
from featcache.heads import find_logits, fit_head
from featcache.metrics import to_probabilities

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
TINY = {"backbone": "tiny", "weights": "none"}


@pytest.mark.parametrize("size", [(400, 20, 2), (900, 30, 12), (60, 200, 3), (20_000, 64, 5)])
@pytest.mark.parametrize("settings", [{"C": 0.1}, {"calibrate": True}, {"class_weight": "balanced"}])
def test_a_head_fitted_on_cuda_is_the_one_fitted_on_the_cpu(
    size: tuple[int, int, int], settings: dict[str, object]
) -> None:
    n, dim, n_classes = size
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(n) % n_classes)
    features = (rng.normal(0, 1, (n_classes, dim))[labels] + rng.normal(0, 2, (n, dim))).astype(np.float32)
    config = HeadConfig(solver="lbfgs", **settings)
    heads = [fit_head(features, labels, n_classes, replace(config, device=device)) for device in ("cpu", "cuda")]
    assert all(fitted.converged for fitted in heads)
    assert heads[0].selection.choice == heads[1].selection.choice
    expected, found = (to_probabilities(find_logits(fitted.head, features)) for fitted in heads)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("tiny")
def test_features_from_cuda_are_those_from_the_cpu(photos: Path, tmp_path: Path) -> None:
    caches = [
        featcache.extract_features(photos, tmp_path / f"{device}.h5", device=device, **TINY).cache
        for device in ("cpu", "cuda")
    ]
    for name, split in caches[0].splits.items():
        expected, found = (np.asarray(cache.splits[name].features, np.float64) for cache in (caches[0], caches[1]))
        assert split.listing.paths == caches[1].splits[name].listing.paths
        np.testing.assert_allclose(found, expected, rtol=1e-2, atol=1e-2)


def test_a_network_fine_tuned_on_cuda_predicts_on_the_cpu(photos: Path, tmp_path: Path, tiny: type[TinyFamily]) -> None:
    run = featcache.finetune(photos, tmp_path / "run", epochs=2, batch_size=4, device="cuda", **TINY)
    images = sorted(str(path) for path in (photos / "val").rglob("*.jpg"))
    classifier = featcache.load_classifier(run.folder)
    for device in ("cpu", "cuda"):
        probabilities, bad = classifier.predict_files(images, device=torch.device(device))
        assert not bad
        np.testing.assert_allclose(probabilities.sum(axis=1), 1, atol=1e-5)


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_fine_tuning_on_cuda_in_any_precision_ends_near_the_cpus_weights(
    photos: Path, tmp_path: Path, precision: str
) -> None:
    on_cpu = featcache.finetune(photos, tmp_path / "cpu", epochs=2, device="cpu", **TINY)
    on_cuda = featcache.finetune(photos, tmp_path / "cuda", epochs=2, device="cuda", precision=precision, **TINY)
    expected, found = (load_file(run.folder / "model.safetensors") for run in (on_cpu, on_cuda))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0.05, atol=0.02)


@pytest.mark.usefixtures("tiny")
def test_deterministic_fine_tuning_on_cuda_gives_the_same_bits_also_when_it_is_interrupted(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("featcache.training.checkpoints.SHARE", 0)
    settings = {"epochs": 3, "device": "cuda", "deterministic": True, "ema": 0.9, "checkpoint_every": 0.0, **TINY}
    digests = [
        hash_file(featcache.finetune(photos, tmp_path / name, **settings).folder / "model.safetensors")
        for name in ("a", "b")
    ]
    interrupt_after(photos, tmp_path / "c", 2, **settings)
    run = featcache.finetune(photos, tmp_path / "c", **settings)
    assert [*digests, hash_file(run.folder / "model.safetensors")] == [digests[0]] * 3


@pytest.mark.usefixtures("tiny")
def test_compiled_fine_tuning_on_cuda_is_near(photos: Path, tmp_path: Path) -> None:
    runs = [
        featcache.finetune(photos, tmp_path / f"{how}", epochs=1, device="cuda", compile=how, precision="fp32", **TINY)
        for how in (False, True)
    ]
    expected, found = (load_file(run.folder / "model.safetensors") for run in runs)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
