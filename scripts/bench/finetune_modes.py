"""The ways to fine-tune beside the head on cached features: accuracy after a few epochs, and what each cost.

    python scripts/bench/finetune_modes.py DATA --backbone efficientnet_lite0 --seeds 3 --epochs 1,2,5

Every run chooses its epoch on training images that are held out; the validation images are looked at once, at its end.
Accuracies are means over the seeds, with the smallest and the largest; the interval is the one that so many validation
images allow for one such run. Seconds are the median of whole runs, extraction of the features included where they are
used. A quarter of an hour on 2 cores for the ants and bees.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

import featcache
from featcache.config import FINETUNE_CHOICES, ExtractConfig
from featcache.metrics import wilson_interval


def describe(records: list[featcache.RunRecord]) -> str:
    """A row of the table."""
    n = records[0].accuracy["val"]["n"]
    right = [record.accuracy["val"]["correct"] for record in records]
    low, high = wilson_interval(round(statistics.mean(right)), n)
    spread = f"{min(right) / n:.3f} to {max(right) / n:.3f}"
    seconds = statistics.median(record.seconds["total"] for record in records)
    return f"{statistics.mean(right) / n:8.3f}  {low:.3f} to {high:.3f}  {spread}  {seconds:9.1f}"


@click.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--backbone", default=ExtractConfig.backbone, show_default=True)
@click.option("--weights", default=ExtractConfig.weights, show_default=True)
@click.option("--seeds", default=3, show_default=True)
@click.option("--epochs", default="1,2,5", show_default=True, help="After how many.")
@click.option("--modes", default=",".join(FINETUNE_CHOICES["mode"]), show_default=True)
def main(data: Path, backbone: str, weights: str, seeds: int, epochs: str, modes: str) -> None:
    network: dict[str, Any] = {"backbone": backbone, "weights": weights}
    with tempfile.TemporaryDirectory() as folder:
        features, run = Path(folder) / "features.h5", Path(folder) / "run"
        featcache.extract_features(data, features, **network)
        print(f"{backbone}, weights {weights}, {seeds} seeds")
        print(f"{'':30s}accuracy  95 % interval   over the seeds    seconds")
        heads = [featcache.train_head(features, run, seed=seed).record for seed in range(seeds)]
        print(f"{'head on cached features':30s}{describe(heads)}", flush=True)
        for mode in modes.split(","):
            for n in map(int, epochs.split(",")):
                records = [
                    featcache.finetune(
                        data, run, mode=mode, epochs=n, seed=seed, features=str(features), force=True, **network
                    ).record
                    for seed in range(seeds)
                ]
                print(f"{f'{mode}, {n} epochs':30s}{describe(records)}", flush=True)


if __name__ == "__main__":
    main()
