"""featcache.plots: every figure draws without a warning, whatever the names and numbers."""

from __future__ import annotations

import io

import numpy as np
import pytest

from featcache import plots


def render(figure: object) -> int:
    """Size in bytes of a figure as PNG; layout problems are warnings, and warnings are errors here."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", bbox_inches="tight")
    return len(buffer.getvalue())


HISTORY = [
    {"epoch": e, "train_loss": 1 / e, "val_loss": 1 / e, "train_accuracy": 0.5, "val_accuracy": 0.6} for e in (1, 2)
]


@pytest.mark.parametrize("n_classes", [2, 3, 10, 60])
@pytest.mark.parametrize("name", ["a", "a very long name of a class, longer than anybody would", "Ümläut 蜂", "$x_$"])
@pytest.mark.filterwarnings("ignore:Glyph")
def test_confusion_matrices_take_any_number_and_names_of_classes(n_classes: int, name: str) -> None:
    counts = np.random.default_rng(0).integers(0, 1000, (n_classes, n_classes))
    classes = [f"{name} {i}" for i in range(n_classes)]
    assert render(plots.draw_confusions({"head": counts, "a/long/path/" * 9: counts}, classes)) > 1000


@pytest.mark.parametrize("epochs", [1, 2])
def test_curves_take_a_single_epoch(epochs: int) -> None:
    assert render(plots.draw_curves(HISTORY[:epochs], "title")) > 1000
    assert render(plots.draw_arm_curves({"finetune": HISTORY[:epochs]}, {"head": 0.9})) > 1000


def test_curves_of_arms_without_epochs_are_level_lines() -> None:
    axes = plots.draw_arm_curves({}, {"a": 0.9, "b": 0.8}).axes[0]
    assert [line.get_ydata()[0] for line in axes.lines] == [0.9, 0.8]


def test_accuracy_against_time_shows_each_arm_with_its_interval() -> None:
    arms = [
        {"name": "head", "cost": {"seconds": {"total": 0.5}}, "accuracy": 1.0, "interval": [0.6, 1.0]},
        {"name": "finetune", "cost": {"seconds": {"total": 900.0}}, "accuracy": 0.0, "interval": [0.0, 0.4]},
    ]
    figure = plots.draw_accuracy_against_time(arms)
    assert len(figure.axes[0].containers) == 2
    assert render(figure) > 1000


@pytest.mark.parametrize("n", [1, 4, 7, 20])
def test_grids_take_any_number_of_pictures(n: int) -> None:
    pictures = np.zeros((n, 8, 8, 3), np.float32)
    assert render(plots.draw_grid(pictures, [str(i) for i in range(n)], right=[i % 2 == 0 for i in range(n)])) > 500
