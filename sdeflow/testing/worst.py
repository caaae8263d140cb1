"""The worst of several residuals of one identity."""

from __future__ import annotations

import math
from typing import Any

from sdeflow.testing.report import Finding


class Worst:
    """The largest of several residuals, with its place."""

    def __init__(self) -> None:
        self.residual, self.where = -math.inf, {}  # type: float, dict[str, Any]

    def add(self, residual: float, **where: Any) -> None:
        residual = math.inf if math.isnan(residual) else residual
        if residual > self.residual:
            self.residual, self.where = residual, where

    def finding(self, identity: str, formula: str, tolerance: float, note: str, none: str = "") -> Finding:
        if self.residual == -math.inf:
            return Finding.skipped(identity, formula, none)
        return Finding.of(identity, formula, self.residual, tolerance, self.where, note)
