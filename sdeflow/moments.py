"""Exact moments of polynomial processes: affine drift, D = G G^T quadratic in x.

The generator L u = f . grad u + 1/2 D : hess u maps polynomials of degree k to such of degree k, so that the moments
m of x_t solve dm/dt = L(t) m, a closed linear system: one matrix exponential where the process is homogeneous, an
ordinary differential equation otherwise (Filipovic and Larsson 2016, Polynomial diffusions, theorem 3.1).
"""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.sde import SDE
from sdeflow.structure import Structure, coefficients, exponents, fitted, monomials, probe_points

Monomial = tuple[int, ...]
"""The sorted variables of a product: (0, 0, 1) is x_0^2 x_1."""


@checked
def moments(
    sde: SDE, x0: Tensor, t: float, *, s: float | None = None, degree: int = 2, structure: Structure | None = None
) -> tuple[list[Monomial], Tensor]:
    """(monomials, their expectations at t given x_s = x0): E[x_t^c | x_s = x0] for all c up to a degree, exactly.

    Args:
        x0: start states (batch, *event).
        t: a time, s <= t.
        s: the start; None for t0.
        structure: of the process, if it is known already.

    Returns:
        The monomials as tuples of variables, () first, and float64 (batch, count).

    Raises:
        ValueError: the process is not polynomial, or t < s.
    """
    if not 0 <= degree <= 100:
        raise ValueError(f"expected a degree from 0 to 100, got {degree}")
    start = sde.t0 if s is None else float(s)
    if t < start:
        raise ValueError(f"expected s <= t, got s = {start:g} and t = {t:g}")
    if x0.ndim < 2 or x0.numel() == 0:
        raise ValueError(f"expected x0 of shape (batch, *event) with at least one sample, got {tuple(x0.shape)}")
    event = tuple(x0.shape[1:])
    known = structure or sde.structure(event)
    if not known.polynomial:
        raise ValueError(f"{type(sde).__name__} is no polynomial process (affine drift, D quadratic in x)")
    basis = exponents(x0[0].numel(), degree)
    first = monomials(x0.to(torch.float64).flatten(1), degree)
    if known.homogeneous:
        matrix = torch.from_numpy(_generator(sde, event, start, basis)) * (t - start)
        return basis, first @ torch.linalg.matrix_exp(matrix).T

    def slope(time: float, packed: np.ndarray) -> np.ndarray:
        return (packed.reshape(first.shape) @ _generator(sde, event, time, basis).T).ravel()

    from scipy.integrate import solve_ivp  # slow to import

    run = solve_ivp(slope, (start, t), first.numpy().ravel(), method="DOP853", rtol=1e-11, atol=1e-13)
    if not run.success:
        raise ArithmeticError(f"the moment equations did not end: {run.message}")
    return basis, torch.from_numpy(run.y[:, -1].reshape(first.shape).copy())


def mean_and_covariance(basis: list[Monomial], values: Tensor) -> tuple[Tensor, Tensor]:
    """(mean (batch, d), covariance (batch, d, d)) of moments up to degree 2 or more."""
    place = {c: k for k, c in enumerate(basis)}
    d = sum(len(c) == 1 for c in basis)
    mean = torch.stack([values[:, place[i,]] for i in range(d)], dim=1)
    second = torch.stack(
        [torch.stack([values[:, place[min(i, j), max(i, j)]] for j in range(d)], dim=1) for i in range(d)], dim=1
    )
    return mean, second - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _generator(sde: SDE, event: tuple[int, ...], t: float, basis: list[Monomial]) -> np.ndarray:
    """L with d E[x^c]/dt = sum_e L[c, e] E[x^e], from the coefficients at time t, fitted as polynomials."""
    d = int(np.prod(event))
    count = len(exponents(d, 2))
    x, _ = probe_points(sde, event, 2 * count + 16, tails=False)
    f, g = coefficients(sde, x, torch.tensor(t, dtype=torch.float64))
    flat = x.flatten(1)
    drift = fitted(flat, f, 1)[0].numpy()  # (1 + d, d)
    spread = fitted(flat, (g @ g.mT).flatten(1), 2)[0].numpy().reshape(count, d, d)
    place = {c: k for k, c in enumerate(basis)}
    low, square = exponents(d, 1), exponents(d, 2)
    matrix = np.zeros((len(basis), len(basis)))
    for row, c in enumerate(basis):
        power = Counter(c)
        for i, k in power.items():
            rest = _without(c, i)
            for factor, value in zip(low, drift[:, i], strict=True):
                matrix[row, place[tuple(sorted(rest + factor))]] += k * value
            for j, m in power.items():
                weight = 0.5 * k * (m - (i == j))
                if weight:
                    rest2 = _without(rest, j)
                    for factor, value in zip(square, spread[:, i, j], strict=True):
                        matrix[row, place[tuple(sorted(rest2 + factor))]] += weight * value
    return matrix


def _without(c: Monomial, i: int) -> Monomial:
    k = c.index(i)
    return c[:k] + c[k + 1 :]
