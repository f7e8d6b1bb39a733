"""What the solvers give: a head, which turns features into logits, and how it came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from featcache.heads.rows import to_float, to_unit_length
from featcache.heads.selection import Selection
from featcache.metering import Spent


class Head(Protocol):
    """Turns features into logits."""

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Raw features (N, D) -> logits (N, C)."""

    def divide_logits(self, temperature: float) -> Head:
        """The head whose logits are these, divided by a temperature."""

    def take_apart(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Plain JSON values, and arrays, that `remake` of its class takes."""

    @property
    def n_parameters(self) -> int:
        """Numbers that were fitted."""


@dataclass(frozen=True, kw_only=True)
class LinearHead:
    """A linear layer on raw (not standardised) features.

    Attributes
    ----------
    weight, bias
        (C, D) and (C,) float32.
    unit_length
        Whether the features are first divided by their length.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]
    unit_length: bool = False

    def logits(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Features (N, D) -> logits (N, C)."""
        rows = to_unit_length(to_float(features)).numpy() if self.unit_length else features
        return rows @ self.weight.T + self.bias

    def divide_logits(self, temperature: float) -> LinearHead:
        """The head whose logits are these, divided by a temperature."""
        factor = np.float32(1 / temperature)
        return replace(self, weight=self.weight * factor, bias=self.bias * factor)

    def take_apart(self) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        """Plain JSON values, and arrays, that `remake` takes."""
        return {"kind": "linear", "unit_length": self.unit_length}, {"weight": self.weight, "bias": self.bias}

    @classmethod
    def remake(
        cls, values: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], shape: tuple[int, int]
    ) -> LinearHead:
        """The head of (C, D) that was taken apart.

        Raises
        ------
        ValueError, KeyError
            If it is of another shape, or something is missing.
        """
        weight, bias = arrays["weight"], arrays["bias"]
        if (weight.shape, bias.shape) != (shape, shape[:1]):
            raise ValueError(f"weight {weight.shape}, bias {bias.shape}")
        weight, bias = weight.astype(np.float32), bias.astype(np.float32)
        return cls(weight=weight, bias=bias, unit_length=bool(values["unit_length"]))

    @property
    def n_parameters(self) -> int:
        """Numbers that were fitted."""
        return self.weight.size + self.bias.size


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A head and how it came about.

    Attributes
    ----------
    head
        On raw features.
    selection
        What it was fitted with, and how that was chosen.
    converged
        Whether the solver reached its tolerance; None of one that takes a given number of steps and has none.
    gradient
        The largest entry of the gradient of objective / (C N) where the solver ended; None of those without one.
    evaluations
        Of the objective, or steps, in the final fit.
    temperature
        That the logits were divided by, or None.
    held_out
        (N, C) logits of the training images, each by a fit that did not see it; None where nobody asked.
    spent
        What all of it cost.
    selecting
        Of which choosing.
    """

    head: Head
    selection: Selection
    converged: bool | None = True
    gradient: float | None = None
    evaluations: int = 0
    temperature: float | None = None
    held_out: NDArray[np.float64] | None = None
    spent: Spent = field(default_factory=Spent)
    selecting: Spent = field(default_factory=Spent)
