"""Faults measured in released samplers, planted here as changes of a plan: the order harness must catch every one.

Each mutant loses at least half an order against the method it was made from, on the same levels.
"""

import dataclasses

import numpy as np
import pytest
import torch

import sdeflow as sf
from sdeflow.solvers import DDIM, DEIS, IPNDM, DPMSolverPP, EDMHeun, UniPC
from tests.exact import F64, slope
from tests.test_orders import END, START, flow_case, full_start, half_second_difference, rms

LEVELS = (48, 96, 192, 384)


def uniform_adams(plan, process):
    """Adams-Bashforth constants of equal steps on any grid (iPNDM as released)."""
    constants = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]
    weights = torch.zeros_like(plan.weights)
    total = plan.weights.sum(1)
    for k in range(plan.nfe):
        row = constants[min(k, plan.weights.shape[1] - 1)]
        weights[k, : len(row)] = total[k] * torch.tensor(row, dtype=F64)
    return dataclasses.replace(plan, weights=weights)


def stale_index(plan, process):
    """Every weight of a past evaluation given to the one before it (UniPC's vary_coeff branch)."""
    weights = plan.weights.clone()
    weights[2:, 2:] = plan.weights[2:, 1:-1]
    weights[2:, 1] = 0.0
    return dataclasses.replace(plan, weights=weights)


def this_alpha(plan, process):
    """alpha at the step's start where the one at its end belongs (a released DDIM step)."""
    alpha = process.alpha(plan.grid)
    sigma = process.sigma(plan.grid)
    ratio = sigma[1:] / sigma[:-1]
    return dataclasses.replace(plan, weights=(alpha[:-1] - alpha[:-1] * ratio)[:, None])


def sigma_of_the_end(plan, process):
    """The state scaled by a norm that takes sigma from the step's end (a released multistep sampler)."""
    alpha, sigma = process.alpha(plan.grid), process.sigma(plan.grid)
    wrong = torch.hypot(alpha[:-1], sigma[1:]) / torch.hypot(alpha[:-1], sigma[:-1])
    return dataclasses.replace(plan, ratio=plan.ratio * wrong[plan.step_of_row] ** 0.1)


def left_rectangle(plan, process):
    """The integral of a weight by its value at the left end (DEIS with too few points)."""
    lam = process.lam(plan.grid)
    h = torch.diff(lam)
    share = h / -torch.expm1(-h)  # the rule over the integral of exp(-u) on [0, h]
    return dataclasses.replace(plan, weights=plan.weights * share[:, None])


def heun_without_its_mean(plan, process):
    """The corrector's two slopes taken with weights 0.6 and 0.4."""
    weights = plan.weights.clone()
    total = weights[1::2].sum(1)
    weights[1::2, 0], weights[1::2, 1] = 0.6 * total, 0.4 * total
    return dataclasses.replace(plan, weights=weights)


MUTANTS = [
    (DPMSolverPP(3, start="singlestep"), half_second_difference),
    (IPNDM(3), uniform_adams),
    (UniPC(3), stale_index),
    (DDIM(), this_alpha),
    (DPMSolverPP(2), sigma_of_the_end),
    (DEIS(2), left_rectangle),
    (EDMHeun(), heun_without_its_mean),
]


@pytest.mark.parametrize(("solver", "mutate"), MUTANTS, ids=[m.__name__ for _, m in MUTANTS])
def test_the_harness_catches_the_fault(solver, mutate):
    flow, x, end = flow_case()
    right, wrong = [], []
    for n in LEVELS:
        grid = sf.grids.quadratic(flow, n, START, END)
        sound = (solver if mutate is uniform_adams else full_start(solver)).plan(flow, grid)
        broken = mutate(sound if mutate is half_second_difference else solver.plan(flow, grid), flow.gaussian)
        with torch.no_grad():
            right.append(rms(sf.solve(flow, x, sound).x - end))
            wrong.append(rms(sf.solve(flow, x, broken).x - end))
    sizes = 1 / np.array(LEVELS)
    assert slope(sizes, wrong) < slope(sizes, right) - 0.5
    assert wrong[-1] > 1.3 * right[-1]
