"""How much of each class to order: the target, moved by the classifier's losses and by what the judge
rejects.

Everything here is float64 arithmetic on what was consumed, in order, so that it is the same after a restart.
"""

import copy
from typing import Any

import numpy as np

_LOSS_MEMORY = 0.9  # share of the running loss that a feedback call keeps
_LOSS_BOUNDS = (0.5, 2.0)  # a class's share moves within these multiples of its target
_ACCEPTANCE_MEMORY = 0.97  # share of the counts that a consumed batch keeps: about 30 batches are remembered
_ACCEPTANCE_PRIOR = 16.0  # orders at the overall acceptance that every class starts from
_ASKED_BOUNDS = (0.5, 3.0)  # rejection moves a class's share of the orders within these multiples


class Steering:
    """Class weights. `target` float64 [C], any scale, is what delivered classes should follow; 0 stays 0."""

    def __init__(self, target: np.ndarray):
        self.target = np.asarray(target, np.float64)
        count = len(self.target)
        self._losses = np.full(count, np.nan)
        self._asked = np.zeros(count)
        self._accepted = np.zeros(count)

    def copy(self) -> "Steering":
        return copy.copy(self)  # arrays are replaced, never changed

    def observe(self, labels: np.ndarray, losses: np.ndarray) -> None:
        """Feedback: labels int64 [n], losses float64 [n] of the classifier on images it trained on."""
        count = len(self.target)
        number = np.bincount(labels, minlength=count)
        total = np.bincount(labels, weights=losses, minlength=count)
        seen = number > 0
        mean = total[seen] / number[seen]
        old = self._losses[seen]
        self._losses = self._losses.copy()
        self._losses[seen] = np.where(np.isnan(old), mean, _LOSS_MEMORY * old + (1 - _LOSS_MEMORY) * mean)

    def consumed(self, asked: np.ndarray, accepted: np.ndarray) -> None:
        """A batch was delivered to its end: int64 [C] how many of each class were ordered and accepted."""
        self._asked = self._asked * _ACCEPTANCE_MEMORY + asked
        self._accepted = self._accepted * _ACCEPTANCE_MEMORY + accepted

    def classes(self) -> np.ndarray:
        """Class weights for the next orders, float64 [C]; the target itself while nothing speaks against
        it."""
        weights = self.target
        if not np.isnan(self._losses).all() and np.nanmean(self._losses) > 0:
            harder = np.nan_to_num(self._losses / np.nanmean(self._losses), nan=1.0)
            weights = bounded(weights * harder, weights, *_LOSS_BOUNDS)
        if not np.array_equal(self._asked, self._accepted):
            overall = self._accepted.sum() / self._asked.sum()
            acceptance = (self._accepted + _ACCEPTANCE_PRIOR * overall) / (self._asked + _ACCEPTANCE_PRIOR)
            weights = bounded(weights / np.maximum(acceptance, 1e-6), weights, *_ASKED_BOUNDS)
        return weights

    def state_dict(self) -> dict[str, Any]:
        return {
            "target": self.target.tolist(),
            "losses": [None if np.isnan(loss) else loss for loss in self._losses.tolist()],
            "asked": self._asked.tolist(),
            "accepted": self._accepted.tolist(),
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Steering":
        steering = cls(np.array(state["target"], np.float64))
        steering._losses = np.array([np.nan if loss is None else loss for loss in state["losses"]], np.float64)
        steering._asked = np.array(state["asked"], np.float64)
        steering._accepted = np.array(state["accepted"], np.float64)
        return steering


def bounded(wanted: np.ndarray, base: np.ndarray, low: float, high: float) -> np.ndarray:
    """Shares proportional to `wanted` as far as each stays within [low, high] times its share of `base`.

    All float64 [C], the base non-negative; the result sums to 1. Where nothing is wanted it is the base.
    """
    base = base / base.sum()
    if wanted.max() <= 0:
        return base
    lower, upper = low * base, high * base
    wanted = np.maximum(wanted, 1e-9 * wanted.max())
    # The sum of clip(scale * wanted, lower, upper) grows with the scale, linearly between the points at which
    # a class leaves its lower or reaches its upper bound: walk along these to where it is 1.
    points = np.concatenate([lower / wanted, upper / wanted])
    order = np.argsort(points, kind="stable")
    points = points[order]
    slopes = np.cumsum(np.concatenate([wanted, -wanted])[order])
    totals = lower.sum() + np.concatenate([[0.0], np.cumsum(slopes[:-1] * np.diff(points))])
    at = int(np.clip(np.searchsorted(totals, 1.0), 1, len(points) - 1))
    slope = slopes[at - 1]
    scale = points[at - 1] + (1.0 - totals[at - 1]) / slope if slope > 0 else points[at]
    shares = np.clip(scale * wanted, lower, upper)
    return shares / shares.sum()
