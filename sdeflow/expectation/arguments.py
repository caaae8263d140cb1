"""What the numbers of a call of `expect` may be."""

from __future__ import annotations

from sdeflow.expectation.estimate import Method

METHODS: tuple[Method, ...] = ("plain", "antithetic", "sobol", "control", "multilevel")
_LEAST_TOL = 1e-100
_MOST = {"num": 10**12, "pilot": 10**7, "batch": 1 << 30, "max_num": 10**15, "coarsest": 10**7, "dimension": 21201}
"""What a call can finish or hold; of Sobol points torch has 21201 dimensions."""


def check(
    tol: float | None, num: int | None, confidence: float, method: str, pilot: int, batch: int, max_num: int,
    coarsest: int, dimension: int,
) -> None:  # fmt: skip
    """Refuse numbers and a method of `expect` that mean nothing."""
    if (tol is None) == (num is None):
        raise ValueError(f"expected tol or num, one of the two, got tol={tol!r} and num={num!r}")
    if tol is not None and not _LEAST_TOL <= tol <= 1 / _LEAST_TOL:
        raise ValueError(f"expected tol > 0, from {_LEAST_TOL:g} to {1 / _LEAST_TOL:g}, got {tol!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"expected confidence in (0, 1), got {confidence!r}")
    if method != "auto" and method not in METHODS:
        raise ValueError(f'expected method "auto" or one of {", ".join(METHODS)}, got {method!r}')
    least = {"num": (num, 2), "pilot": (pilot, 64), "batch": (batch, 1), "max_num": (max_num, 2)}
    least |= {"coarsest": (coarsest, 1), "dimension": (dimension, 1)}
    for name, (value, low) in least.items():
        most = _MOST[name]
        if value is not None and not low <= value <= most:
            raise ValueError(f"expected {name} as an integer >= {low}, got {value!r} (at most {most})")
