"""The order that errors over several grids show, against the one declared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from sdeflow.metrics import fitted_order
from sdeflow.testing.report import Finding

SLACK = 0.25
"""A fitted order may be this much below the one declared."""
_FLOOR = 3e-14
"""Errors below are rounding and say nothing about an order."""


def order_finding(
    identity: str, formula: str, declared: float, levels: Sequence[int], errors: Sequence[float], note: str,
    **where: Any,
) -> Finding:  # fmt: skip
    """declared - fitted, over the levels whose errors are not rounding."""
    place = {**where, "steps": list(levels), "errors": list(errors)}
    if not all(math.isfinite(e) for e in errors):
        return Finding.of(identity, formula, math.inf, SLACK, place, "the error is not finite")
    above = [(n, e) for n, e in zip(levels, errors, strict=True) if e > _FLOOR]
    if len(above) < 3:
        stuck = max(errors) > 1e-9  # reached rounding within two levels, or was there from the start
        return Finding.of(identity, formula, declared if stuck and len(above) == 2 else 0.0, SLACK, place, note)
    fitted = fitted_order([1 / n for n, _ in above], [e for _, e in above])
    return Finding.of(
        identity, formula, max(0.0, declared - fitted), SLACK, {"declared": declared, "fitted": fitted, **place}, note
    )


def lowest(findings: Sequence[Finding]) -> Finding:
    """The one of the largest residual."""
    return max(findings, key=lambda f: f.residual if not math.isnan(f.residual) else -1.0)
