"""`check_sde`: every planted mistake is caught by the identity named for it.

The table of mutants is printed with `-s`, with the margin between the wrong residual and the right one in decades.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import sdeflow as sf
from sdeflow import calculus, linear, matrix_kernel, reverse
from sdeflow import sde as sde_module
from sdeflow.gaussian import GaussianSDE
from sdeflow.kept import forget
from sdeflow.known import GBM
from sdeflow.linear import LinearSDE
from sdeflow.matrix_kernel import LinearKernel
from sdeflow.problems import GaussianMixture
from sdeflow.pushforward import Pushforward
from sdeflow.reverse import ReverseSDE
from sdeflow.solvers import DDIM
from sdeflow.testing import Report, check_sde, gaussian_law
from sdeflow.testing import reversal as reversal_module
from sdeflow.testing.fields import Flat, divergence
from sdeflow.testing.gaussian_law import GaussianLaw, kernel_identities, kernel_of, scalar_identities
from sdeflow.testing.report import Finding
from sdeflow.testing.reversal import reversal_identities
from tests.check_sde_cases import (
    OU,
    SCALAR_WARNING,
    Multiplicative,
    Rounded,
    crossed_sde,
    hand,
    image_sde,
    law_identities,
    linear_sde,
    matrix_sde,
    moments,
    ou_density,
    ou_marginal,
    ou_score,
    rotating,
    setting,
    spread,
    stratonovich_sde,
)
from tests.exact import F64

pytestmark = pytest.mark.filterwarnings(SCALAR_WARNING)


@dataclass
class Mutant:
    """A mistake: what is checked without and with it, and the identity that must catch it."""

    name: str
    identity: str
    right: Callable[[], Report]
    plant: Callable[[pytest.MonkeyPatch], None] | None = None
    wrong: Callable[[], Report] | None = None


def derived(make: Callable[[], sf.SDE]) -> Callable[[], Report]:
    """The identities of a reversal, on trial densities."""
    return lambda: Report("", tuple(reversal_identities(setting(make(), 4), None, None)))


def kernel(make: Callable[[], Any], *, reversals: bool = False) -> Callable[[], Report]:
    """The identities of a Gaussian kernel, those of its reversals only where they are wanted: they take long."""

    def run() -> Report:
        sde = make()
        law = kernel_of(sde, (2,))
        assert law is not None
        with pytest.MonkeyPatch.context() as patch:
            if not reversals:
                patch.setattr(gaussian_law, "_reversals", lambda *a: [])
            return Report("", tuple(kernel_identities(GaussianLaw(Flat(sde, (2,)), law))))

    return run


def scalar(make: Callable[[], GaussianSDE]) -> Callable[[], Report]:
    """Posteriors and samplers; without the path measure, which takes longest."""

    def run() -> Report:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gaussian_law, "_girsanov", lambda *a: Finding.skipped("Girsanov", "", "for speed"))
            patch.setattr(gaussian_law, "_changes_of_variable", lambda *a: [])
            return Report("", tuple(scalar_identities(make())))

    return run


def checked(make: Callable[[], sf.SDE], **claims: Any) -> Callable[[], Report]:
    return lambda: check_sde(make(), points=6, **claims)


def law_of(make: Callable[[], Any]) -> Callable[[], Report]:
    def run() -> Report:
        sde = make()
        return Report("", tuple(law_identities(setting(sde, 4, 0, sde.log_density), sde)))

    return run


def setter(owner: Any, name: str, value: Any) -> Callable[[pytest.MonkeyPatch], None]:
    return lambda patch: patch.setattr(owner, name, value)


def wrapped(owner: Any, name: str, change: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    """`name` of `owner` replaced by change(the original, *arguments)."""
    original = getattr(owner, name)
    return lambda patch: patch.setattr(owner, name, lambda *a, **k: change(original, *a, **k))


def reverse_drift(weight=lambda e: 0.5 * (1 + e**2), div=lambda e: 1.0, score=1.0, sign=1.0, shift=0.0, still=False):
    """ReverseSDE.drift of general processes, as it would be written with a mistake in it."""

    def drift(self, x, t):
        process, eta = self.process, self.eta_at(t)
        s = self.model.score(x, t + shift)
        s = score * (s.detach() if still else s)
        value = div(eta) * self.divergence(x, t) + reverse.apply_covariance(process, x, t, s)
        return sign * (process.ito_drift(x, t) - process.direction * weight(eta) * value)

    return setter(ReverseSDE, "drift", drift)


def columns(x, t, sde):
    g = sde.diffusion(x, t)
    return g, [divergence(g[..., k], x) for k in range(g.shape[-1])]


def column_divergence(sde, x, t):
    """sum_k G_k div G_k."""
    with torch.enable_grad():
        leaf = x if x.requires_grad else x.detach().requires_grad_()
        g, divs = columns(leaf, t, sde)
        return sum(g[..., k] * divs[k].unsqueeze(-1) for k in range(g.shape[-1]))


def wrong_covariance(sde, x, t, v):
    """G^T G v."""
    g = sde.diffusion(x, t)
    return (g.mT @ (g @ v.unsqueeze(-1))).squeeze(-1)


def transposed_noise(self, x, t):
    y, g = self._base_noise(x, t)
    return self._jacobian(y)[0].mT @ g


def no_log_det_score(self, x, t):
    """J^-T grad log p_Y: the gradient of log |det J| forgotten."""
    y = self.inverse(x).detach().requires_grad_()
    (slope,) = torch.autograd.grad(self._base_log_density(y, t).sum(), y)
    return torch.linalg.solve(self._jacobian(y)[0].mT, slope.unsqueeze(-1)).squeeze(-1).detach()


def untransposed_score(self, x, t):
    """J^-1 for J^-T, of a map whose Jacobian is not symmetric."""
    y = self.inverse(x).detach().requires_grad_()
    jacobian = self._jacobian(y)[0]
    value = self._base_log_density(y, t) - torch.linalg.slogdet(jacobian)[1]
    (slope,) = torch.autograd.grad(value.sum(), y)
    return torch.linalg.solve(jacobian, slope.unsqueeze(-1)).squeeze(-1).detach()


def skew_image() -> Pushforward:
    base = LinearSDE([[-0.5, 0.3], [-0.2, -0.4]], [[0.8, 0.2], [0.1, 0.7]])
    law = GaussianMixture([[-1.0, 0.5], [0.6, -0.4]], 0.5)

    def shear(y):
        return torch.stack([y[:, 0] + 0.5 * torch.sin(y[:, 1]), y[:, 1]], 1)

    return Pushforward(shear, base, law=law)


class SubVPRoot(sf.SubVP):
    def sigma(self, t):
        return torch.sqrt(-torch.expm1(2 * self.log_alpha(t)))


class VESquare(sf.VE):
    def diffusion_coeff(self, t):
        return self.sigma(t)


class AlphaForSquare(sf.VP):
    def sigma(self, t):
        return torch.sqrt(-torch.expm1(self.log_alpha(t)))


class FullBeta(sf.VP):
    def drift_coeff(self, t):
        return -self.beta(t)


class NoRoot(sf.VP):
    def diffusion_coeff(self, t):
        return self.beta(t)


class HalfExponent(sf.VP):
    def log_alpha(self, t):
        return 2 * super().log_alpha(t)


def wrong_posterior(self, t0, t1, prediction="x0"):
    """The step's own noise, beta, in place of the posterior's, beta-tilde."""
    ratio, amp, c, std = _TRANSITION(self, t0, t1, prediction)
    return ratio, amp, c, torch.where(std > 0, self.process.transition_kernel(t1, t0)[1], std)


def alpha_ratio(original, self, problem, grid):
    plan, alpha = original(self, problem, grid), problem.process.alpha(grid)
    return dataclasses.replace(plan, ratio=alpha[1:] / alpha[:-1])


_TRANSITION = ReverseSDE.transition


def full_score_row(original, self, process, t):
    """g^2 eps/sigma for g^2 eps/(2 sigma) in the noise's part of the drift."""
    d_alpha, d_sigma = original(self, process, t)
    return d_alpha, d_sigma + self.eta_at(t) ** 2 * process.diffusion_coeff(t) ** 2 / (2 * process.sigma(t))


def x0_with_sigma(original, self, x, t):
    """(x + sigma s)/alpha."""
    process = self.gaussian
    return (x + process.sigma(t) * self.score(x, t)) / process.alpha(t)


def eps_is_score(original, self, x, t):
    """The noise itself taken for the score: no -1/sigma."""
    return -self.gaussian.sigma(t) * original(self, x, t)


def declared(make: Callable[[], sf.SDE], **facts: bool) -> Callable[[], sf.SDE]:
    def run() -> sf.SDE:
        sde = make()
        for name, value in facts.items():
            setattr(sde, name, value)
        return sde

    return run


def swapped_compose(original, later, earlier):
    f = later.matrix
    found = original(later, earlier)
    return found._replace(covariance=f.mT @ earlier.covariance @ f + later.covariance)


def double_diffusion(original, sde, event, t, basis):
    """D : hess for D : hess/2, by doubling G G^T."""

    class Louder(sf.SDE):
        noise, domain = sde.noise, sde.domain
        t0, t1 = sde.t0, sde.t1

        def drift(self, x, time):
            return sde.drift(x, time)

        def diffusion(self, x, time):
            return math.sqrt(2) * sde.diffusion(x, time)

    return original(Louder(), event, t, basis)


KEEPS, STRATONOVICH = "reversal keeps the marginals", "reverse, Stratonovich form"
BOTH, KERNEL = "Ito and Stratonovich drifts", "kernel"

MATRIX, IMAGE, LINEAR = derived(matrix_sde), law_of(image_sde), kernel(linear_sde)
VP_KERNEL, SCALAR, WRITTEN = kernel(sf.VP), scalar(sf.EDM), checked(Multiplicative, reverse_drift=hand(1.0))
DENSITY, MARGINAL = checked(OU, log_density=ou_density), checked(OU, marginal=ou_marginal)

MUTANTS = [
    # the reversal
    Mutant("dropped div D", KEEPS, MATRIX, reverse_drift(div=lambda e: 0.0)),
    Mutant("half of div D", KEEPS, MATRIX, reverse_drift(div=lambda e: 0.5)),
    Mutant("div D times eta^2", KEEPS, MATRIX, reverse_drift(div=lambda e: e**2)),
    Mutant("G^T G for G G^T", KEEPS, MATRIX, setter(reverse, "apply_covariance", wrong_covariance)),
    Mutant("sum_k G_k div G_k for div D", KEEPS, MATRIX, setter(reverse, "divergence", column_divergence)),
    Mutant("(dG_k) G_k for div D", KEEPS, MATRIX,
           setter(reverse, "divergence", lambda sde, x, t: 2 * calculus.correction(sde, x, t))),
    Mutant("own coordinate alone in div D", KEEPS, derived(crossed_sde),
           setter(calculus, "_is_own_coordinate", lambda *a: True)),
    Mutant("weight 1 for (1 + eta^2)/2", KEEPS, MATRIX, reverse_drift(weight=lambda e: 1 + 0 * e)),
    Mutant("eta for eta^2", KEEPS, MATRIX, reverse_drift(weight=lambda e: 0.5 * (1 + e))),
    Mutant("sign of the drift", KEEPS, MATRIX, reverse_drift(sign=-1.0)),
    Mutant("sign of the score", KEEPS, MATRIX, reverse_drift(score=-1.0)),
    Mutant("score times 1.001", KEEPS, MATRIX, reverse_drift(score=1.001)),
    Mutant("score detached from x", "continuity of the flow", MATRIX, reverse_drift(still=True)),
    Mutant("a function eta frozen at t = 0", KEEPS, MATRIX,
           wrapped(ReverseSDE, "eta_at", lambda original, self, t: original(self, 0 * torch.as_tensor(t)))),
    Mutant("noise eta^2 G", STRATONOVICH, MATRIX,
           wrapped(ReverseSDE, "diffusion", lambda original, self, x, t:
                   original(self, x, t) * (1.0 if callable(self.eta) else float(self.eta)))),
    Mutant("noise of twice reversed", "involution", MATRIX,
           setter(ReverseSDE, "diffusion", lambda self, x, t: self.process.diffusion(x, t))),
    Mutant("score at a later time", "reverse Fokker-Planck", law_of(lambda: GBM(0.3, 0.5)), reverse_drift(shift=0.01)),
    Mutant("eta scaled with time", "time change", MATRIX,
           wrapped(ReverseSDE, "eta_at", lambda original, self, t: original(self, t) * (1 + 0.1 * torch.as_tensor(t)))),
    # Ito and Stratonovich
    Mutant("Stratonovich drift taken as Ito", BOTH, derived(stratonovich_sde),
           setter(sde_module.SDE, "ito_drift", lambda self, x, t: self.drift(x, t))),
    Mutant("Ito drift taken as Stratonovich", BOTH, MATRIX,
           setter(sde_module.SDE, "stratonovich_drift", lambda self, x, t: self.drift(x, t))),
    Mutant("correction without 1/2", BOTH, MATRIX,
           setter(sde_module, "correction", lambda sde, x, t: 2 * calculus.correction(sde, x, t))),
    Mutant("sign of the correction", BOTH, MATRIX,
           setter(sde_module, "correction", lambda sde, x, t: -calculus.correction(sde, x, t))),
    Mutant("direction forgotten in the correction", STRATONOVICH, MATRIX,
           setter(sde_module.SDE, "stratonovich_drift",
                  lambda self, x, t: self.drift(x, t) - calculus.correction(self, x, t))),
    # changes of variable
    Mutant("time change without sqrt", "time change", MATRIX,
           setter(reversal_module.TimeChanged, "diffusion",
                  lambda self, x, t: self._slope(t).unsqueeze(-1) * self.base.diffusion(x, self._h(t)))),
    Mutant("J^T for J in the image's noise", "affine equivariance", MATRIX,
           setter(Pushforward, "diffusion", transposed_noise)),
    Mutant("no Ito curvature in the image", "naturality", MATRIX,
           setter(Pushforward, "_curvature", lambda self, y, g: torch.zeros_like(y))),
    Mutant("Ito curvature without 1/2", "naturality", MATRIX,
           wrapped(Pushforward, "_curvature", lambda original, self, y, g: 2 * original(self, y, g))),
    Mutant("no log det", "law: Fokker-Planck", IMAGE,
           setter(Pushforward, "log_det", lambda self, y: 0 * y.sum(1))),
    Mutant("sign of log det", "law: Fokker-Planck", IMAGE,
           wrapped(Pushforward, "log_det", lambda original, self, y: -original(self, y))),
    Mutant("no gradient of log det in the score", "law: score", IMAGE,
           setter(Pushforward, "score", no_log_det_score)),
    Mutant("J^-1 for J^-T in the score", "law: score", law_of(skew_image),
           setter(Pushforward, "score", untransposed_score)),
    # kernels
    Mutant("exp(A h) transposed", KERNEL, LINEAR,
           wrapped(linear, "exponential", lambda original, z: original(z)._replace(matrix=original(z).matrix.mT))),
    Mutant("Phi^T Q Phi for Phi Q Phi^T", KERNEL, LINEAR,
           wrapped(matrix_kernel, "compose", swapped_compose)),
    Mutant("dropped offset", KERNEL, LINEAR,
           wrapped(LinearSDE, "transition", lambda original, self, s, t: LinearKernel(
               original(self, s, t).matrix, 0 * original(self, s, t).shift, original(self, s, t).covariance))),
    Mutant("G for G G^T", KERNEL, LINEAR,
           wrapped(LinearSDE, "coefficients", lambda original, self, t: original(self, t)._replace(noise=self._G(t)))),
    Mutant("no commutator for A(t) that do not commute", KERNEL,
           kernel(lambda: LinearSDE(rotating, [[0.7, 0.1], [0.0, 0.4]])),
           setter(linear, "commute", lambda values: True)),
    Mutant("covariance of the start forgotten in composing", "Chapman-Kolmogorov", LINEAR,
           wrapped(LinearSDE, "transition", lambda original, self, s, t: original(self, s, t)._replace(
               covariance=original(self, s, t).covariance + 0.1 * torch.eye(2, dtype=F64)))),
    Mutant("variance for deviation", KERNEL, VP_KERNEL, wrapped(GaussianSDE, "transition_kernel",
           lambda original, self, s, t: (original(self, s, t)[0], original(self, s, t)[1] ** 2))),
    Mutant("sub-VP: root of 1 - alpha^2", KERNEL, kernel(sf.SubVP), wrong=kernel(SubVPRoot)),
    Mutant("VE: g = sigma", KERNEL, kernel(sf.VE), wrong=kernel(VESquare)),
    Mutant("alpha for alpha^2", KERNEL, VP_KERNEL, wrong=kernel(AlphaForSquare)),
    Mutant("drift -beta x for -beta x/2", KERNEL, VP_KERNEL, wrong=kernel(FullBeta)),
    Mutant("g = beta for its root", KERNEL, VP_KERNEL, wrong=kernel(NoRoot)),
    Mutant("alpha^2 for alpha in the mean", KERNEL, VP_KERNEL, wrong=kernel(HalfExponent)),
    Mutant("g^2 for g^2/2 in a Gaussian reversal", "any eta keeps the marginals", kernel(sf.VP, reversals=True),
           wrapped(ReverseSDE, "_drift_row", full_score_row)),
    # posteriors and samplers
    Mutant("Tweedie: sigma for sigma^2", "Tweedie mean", SCALAR, wrapped(sf.Model, "x0", x0_with_sigma)),
    Mutant("noise taken for score", "reverse martingale", SCALAR, wrapped(sf.Model, "score", eps_is_score)),
    Mutant("DDPM: beta for beta-tilde", "DDPM posterior is the bridge", SCALAR,
           setter(ReverseSDE, "transition", wrong_posterior)),
    Mutant("DDIM: alpha ratio for sigma ratio", "DDIM is exponential Euler", SCALAR,
           wrapped(DDIM, "plan", alpha_ratio)),
    # moments
    Mutant("generator without 1/2", "kernel and moments", checked(linear_sde),
           wrapped(moments, "_generator", double_diffusion)),
    # what users claim
    Mutant("claimed variance for deviation", "claimed marginal", MARGINAL,
           wrong=checked(OU, marginal=lambda x0, t: (ou_marginal(x0, t)[0], spread(t)))),
    Mutant("claimed mean", "claimed marginal", MARGINAL,
           wrong=checked(OU, marginal=lambda x0, t: (x0 * math.exp(-1.01 * t), ou_marginal(x0, t)[1]))),
    Mutant("claimed density times 2", "mass", DENSITY,
           wrong=checked(OU, log_density=lambda x, t: ou_density(x, t, factor=2.0))),
    Mutant("claimed density 1% too wide", "Fokker-Planck", DENSITY,
           wrong=checked(OU, log_density=lambda x, t: ou_density(x, t, scale=1.01))),
    Mutant("claimed density of another drift", "Fokker-Planck", DENSITY,
           wrong=checked(OU, log_density=lambda x, t: ou_density(x, t, rate=0.9))),
    Mutant("claimed score times 1.001", "score", checked(OU, log_density=ou_density, score=ou_score),
           wrong=checked(OU, log_density=ou_density, score=lambda x, t: ou_score(x, t, 1.001))),
    Mutant("claimed score times 1.001, no density", "score: Fokker-Planck", checked(OU, score=ou_score),
           wrong=checked(OU, score=lambda x, t: ou_score(x, t, 1.001))),
    Mutant("hand-written reverse without div D", "hand-written reverse drift",
           WRITTEN,
           wrong=checked(Multiplicative, reverse_drift=hand(1.0, 0.0))),
    Mutant("hand-written reverse on the other clock", "hand-written reverse drift",
           WRITTEN,
           wrong=checked(Multiplicative, reverse_drift=hand(1.0, sign=-1.0))),
    Mutant("hand-written flow with the whole score", "hand-written flow drift",
           checked(Multiplicative, flow_drift=hand(0.5)), wrong=checked(Multiplicative, flow_drift=hand(1.0))),
    Mutant("float32 inside the class", "Fokker-Planck", DENSITY, wrong=checked(Rounded, log_density=ou_density)),
    Mutant("declared affine", "declared affine", checked(declared(OU, affine=True)),
           wrong=checked(declared(Multiplicative, affine=False))),
    Mutant("declared additive", "declared additive", checked(declared(Multiplicative, additive=False)),
           wrong=checked(declared(Multiplicative, additive=True))),
    Mutant("declared homogeneous", "declared homogeneous", checked(declared(crossed_sde, homogeneous=True)),
           wrong=checked(declared(crossed_sde, homogeneous=False))),
    Mutant("declared commutative", "declared commutative", checked(declared(crossed_sde, commutative=False)),
           wrong=checked(declared(crossed_sde, commutative=True))),
    Mutant("no div D, no density: on a grid", "Fokker-Planck on a grid", checked(Multiplicative),
           reverse_drift(div=lambda e: 0.0)),
]  # fmt: skip

TINY = 1e-17


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "part", [slice(1, None, 4), pytest.param(slice(None), marks=pytest.mark.slow)], ids=["4th", "all"]
)
def test_every_mutant_is_caught(part, monkeypatch):
    """The mutation score: the table of README's claim, by `pytest -m slow -s`; here every fourth."""
    rows, missed, rights = [], [], {}
    for mutant in MUTANTS[part]:
        forget()
        if mutant.right not in rights:
            rights[mutant.right] = mutant.right()
        right = rights[mutant.right][mutant.identity]
        with monkeypatch.context() as patch:
            if mutant.plant is not None:
                mutant.plant(patch)
                forget()  # plans made before
            wrong = (mutant.wrong or mutant.right)()[mutant.identity]
        margin = math.log10(max(wrong.residual, TINY) / max(right.residual, TINY))
        rows.append((mutant.name, mutant.identity, right.residual, wrong.residual, margin))
        if right.verdict != "pass" or wrong.verdict != "fail" or (right.residual < 1e-10 and margin < 5):
            missed.append(f"{mutant.name}: {right} -> {wrong}")
    print()
    for name, identity, right_residual, wrong_residual, margin in rows:
        print(f"  {name:48} {identity:30} {right_residual:8.1e} {wrong_residual:8.1e} {margin:6.1f}")
    print(f"  {len(rows) - len(missed)} of {len(rows)} caught")
    assert not missed, "\n".join(missed)
    assert len({m.name for m in MUTANTS}) == len(MUTANTS) >= 24


def test_a_mutant_is_caught_by_no_identity_that_it_does_not_touch(monkeypatch):
    """The forward conversions know nothing of the reversal: verdicts are apart."""
    reverse_drift(div=lambda e: 0.0)(monkeypatch)
    report = derived(matrix_sde)()
    assert report["Ito and Stratonovich drifts"].verdict == "pass"
    assert report["reversal keeps the marginals"].verdict == "fail"
