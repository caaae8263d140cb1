"""Grids and coefficients fitted to a model: `tune`, and schedules from pilot trajectories to compare it with."""

from sdeflow.tuning.fit import tune
from sdeflow.tuning.schedules import equal_local_error, score_change, shortest_path

__all__ = ["equal_local_error", "score_change", "shortest_path", "tune"]
