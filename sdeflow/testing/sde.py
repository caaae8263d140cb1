"""`check_sde`: everything derived from an SDE, identity by identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked
from sdeflow.gaussian import GaussianSDE
from sdeflow.linear import LinearSDE
from sdeflow.moments import mean_and_covariance, moments
from sdeflow.pushforward import Pushforward
from sdeflow.sde import SDE
from sdeflow.structure import Structure, linear_form, probe_event, probe_points, structure
from sdeflow.testing.claimed_score import score_identities
from sdeflow.testing.claims import Claims, declared_event, mixture_law
from sdeflow.testing.fields import Flat, LogDensity, trial_density
from sdeflow.testing.fokker_planck import grid_identity
from sdeflow.testing.gaussian_law import GaussianLaw, Kernel, kernel_identities, kernel_of, scalar_identities
from sdeflow.testing.known_density import Line, density_identities, line_identities
from sdeflow.testing.pitfalls import pitfalls
from sdeflow.testing.report import Finding, Report
from sdeflow.testing.reversal import HandWritten, Setting, reversal_identities

_DECLARABLE = ("affine", "homogeneous", "additive", "commutative")


@checked
def check_sde(
    sde: SDE,
    *,
    log_density: LogDensity | None = None,
    score: Callable[[Tensor, Tensor], Tensor] | None = None,
    marginal: Callable[[Tensor, float], tuple[Any, Any]] | None = None,
    reverse_drift: HandWritten | None = None,
    flow_drift: HandWritten | None = None,
    event: tuple[int, ...] | None = None,
    points: int = 24,
    seed: int = 0,
) -> Report:
    """A verdict on every identity that the process, and what the library derives from it, must obey.

    What the class itself offers under the names of the arguments (a method `log_density`, `score`, `marginal`,
    `reverse_drift`, `flow_drift`) is checked as if it were given here. Without a known law the reversal is checked on
    trial densities (the identities hold for every density), by push-forwards, by exact polynomial moments and by the
    Fokker-Planck equation on a grid; the report says which identities could not be tested.

    Args:
        log_density: log p_t(x), of x (n, *event) at t (n, 1, ..., 1), -> (n,), of the process's own law.
        score: grad log p_t(x), as claimed, called as (x, t); checked against log_density, without one against the
            gradient of the Fokker-Planck equation, which the score of every law of the process obeys.
        marginal: (mean, standard deviation) of x_t given x_0, called as (x0 (n, *event), t); the deviation broadcasts
            against x0. Checked against alpha x_0 and sigma of a `GaussianSDE`, else against the moment equations. The
            method of a `LinearSDE` returns a factor of the covariance instead, as the library's does.
        reverse_drift, flow_drift: hand-written drifts (x, t, score value) of the reverse SDE (eta = 1) and of the
            probability flow, on the process's clock.
        event: the shape of one sample; None as in `structure`.
        points: how many points.
        seed: of the points and the trial density.

    Returns:
        A `Report`; its `verify()` raises in a test.

    Raises:
        TypeError: `sde` is not an SDE.
        ValueError: it cannot be evaluated anywhere.
    """
    if not isinstance(sde, SDE):
        raise TypeError(f"expected an SDE, got {type(sde).__name__}")
    points, seed = int(points), int(seed)
    if not 1 <= points <= 1_000_000:
        raise ValueError(f"expected at least 1 point, and at most a million, got {points}")
    declared = declared_event(sde) if event is None else event
    event, known = _structure(sde, declared)
    hint = "" if declared is not None else f"; no event is declared or given: {event} was tried"
    claims = Claims(sde, event, log_density, score, marginal, reverse_drift, flow_drift)
    x, t = _points(sde, event, points, seed)
    flat = Flat(sde, event)
    density = trial_density(flat.d, sde.domain, seed)
    at = Setting(flat, x.flatten(1), t.reshape(-1, 1), density)
    findings = [*_declared(sde, known), *_guarded("reversal", lambda: _reversal(at, claims))]
    findings += _guarded("law", lambda: _law(sde, event, known, claims, points, seed), hint)
    findings += _guarded("score", lambda: _score(at, claims), hint)
    findings += _guarded("kernel", lambda: _kernel(sde, flat, known, claims), hint)
    if claims.density is None and not isinstance(sde, (GaussianSDE, LinearSDE)):
        findings += _guarded("grid", lambda: [_grid(sde, event, known)])
    return Report(_name(sde), tuple(findings), _facts(sde, known), pitfalls(sde, known))


def _structure(sde: SDE, event: tuple[int, ...] | None) -> tuple[tuple[int, ...], Structure]:
    try:
        event = probe_event(sde, event)
        return event, structure(sde, event)
    except (TypeError, ValueError):
        raise
    except Exception as error:  # a user's function may fail in any way
        raise ValueError(
            f"{type(sde).__name__}: drift or diffusion fails on event {event}: {type(error).__name__}: {error}"
        ) from error


def _name(sde: SDE) -> str:
    text = repr(sde)
    return type(sde).__name__ if text.startswith("<") else text


def _points(sde: SDE, event: tuple[int, ...], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Points inside the domain and, where the process says how, on the set that it lives on."""
    x, t = probe_points(sde, event, count, tails=False, seed=seed)
    onto = getattr(sde, "onto", None)
    return (x if onto is None else onto(x)), t


def _guarded(what: str, run: Callable[[], list[Finding]], hint: str = "") -> list[Finding]:
    """The findings, or one that says why there are none: a user's function may fail in any way."""
    try:
        return run()
    except Exception as error:  # reported, not swallowed: it is a failed identity
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300] + hint
        return [Finding.of(f"{what}: evaluation", "runs on float64 tensors with gradients", math.inf, 0.0, {}, text)]


def _declared(sde: SDE, known: Structure) -> list[Finding]:
    names = [name for name in _DECLARABLE if getattr(sde, name, None) is not None]
    if not names:
        return []
    probe = _Undeclared(sde)
    probed = structure(probe, known.event)
    findings = []
    for name in names:
        wrong = bool(getattr(sde, name)) != getattr(probed, name)
        note = f"declared {name} = {getattr(sde, name)}, the probes say {getattr(probed, name)}"
        findings.append(Finding.of(f"declared {name}", "declaration = probes", float(wrong), 0.0, {}, note))
    return findings


class _Undeclared(SDE):
    """`base` with nothing declared."""

    def __init__(self, base: SDE) -> None:
        self.base, self.noise, self.interpretation = base, base.noise, base.interpretation
        self.t0, self.t1, self.event, self.domain = base.t0, base.t1, base.event, base.domain

    def drift(self, x: Tensor, t: Tensor) -> Tensor:
        return self.base.drift(x, t)

    def diffusion(self, x: Tensor, t: Tensor) -> Tensor:
        return self.base.diffusion(x, t)


def _reversal(at: Setting, claims: Claims) -> list[Finding]:
    return reversal_identities(at, claims.reverse_drift, claims.flow_drift)


def _score(at: Setting, claims: Claims) -> list[Finding]:
    """A score without a density: no trial density has it, nor that of the library's mixture data."""
    return [] if claims.score is None or claims.claimed_density is not None else score_identities(at, claims.score)


def _law(sde: SDE, event: tuple[int, ...], known: Structure, claims: Claims, points: int, seed: int) -> list[Finding]:
    if claims.density is None:
        give = "log_density, or law= to the Pushforward" if isinstance(sde, Pushforward) else "log_density"
        why = f"no law is known: give {give} (the reversal was tested on trial densities)"
        return [Finding.skipped("Fokker-Planck of the law", "d_t log p = FP(f, D) p / p", why)]
    x, t = _points(sde, event, points, seed + 1)
    at = Setting(Flat(sde, event), x.flatten(1), t.reshape(-1, 1), claims.density)
    findings = density_identities(at, None if claims.claimed_density is None else claims.score)
    if event == (1,) or (known.own_coordinate and _accepts_line(sde)):
        x, t = _points(sde, (1,), points, seed + 2)
        density, other = claims.density, claims.other
        if isinstance(sde, (GaussianSDE, LinearSDE)) and event != (1,):
            density, other = (mixture_law(sde, 1, k) for k in (0, 1))
        elif event != (1,):
            return findings
        line = Setting(Flat(sde, (1,)), x, t.reshape(-1, 1), density)
        findings += line_identities(line, other)
        if known.polynomial:
            findings.append(_line_moments(sde, known, line))
    return findings


def _line_moments(sde: SDE, known: Structure, line: Setting) -> Finding:
    """Moments of the density at two times against the moment equations between them."""
    low, high = sde.smooth_window
    s, t = low + 0.4 * (high - low), low + 0.8 * (high - low)
    panels = Line(line.flat, line.density, [s, t])
    own = structure(sde, (1,))
    basis, columns = moments(sde, panels.x, t, s=s, degree=2, structure=own)
    worst = 0.0
    for k in range(1, len(basis)):
        want, got = panels.mean(columns[:, k], s), panels.mean(panels.x[:, 0] ** k, t)
        worst = max(worst, abs(got - want) / (1 + abs(want)))
    formula = "E[x_t^k] = E[(exp(L (t - s)) x^k)(x_s)], k = 1, 2"
    return Finding.of("moments of the law", formula, worst, 1e-7, {"s": s, "t": t})


def _accepts_line(sde: SDE) -> bool:
    try:
        structure(sde, (1,))
    except Exception:  # any failure of a user's function on this shape means no
        return False
    return True


def _kernel(sde: SDE, flat: Flat, known: Structure, claims: Claims) -> list[Finding]:
    findings = []
    kernel: Kernel | None = kernel_of(sde, flat.event)
    if kernel is None and known.affine and known.additive and len(flat.event) == 1:
        kernel = kernel_of(linear_form(sde, known), flat.event)
    if kernel is not None:
        findings += kernel_identities(GaussianLaw(flat, kernel))
    if isinstance(sde, GaussianSDE):
        findings += scalar_identities(sde)
    if known.polynomial and kernel is not None:
        findings.append(_kernel_moments(sde, flat, known, kernel))
    if claims.marginal is not None and known.polynomial:
        findings.append(_marginal(sde, flat, known, claims))
    elif claims.marginal is not None:
        why = "the moments of this process obey no closed equations"
        findings.append(Finding.skipped("claimed marginal", "mean and deviation = moment equations", why))
    elif known.polynomial and kernel is None:
        findings.append(Finding.skipped("claimed marginal", "mean and deviation = moment equations", "none is claimed"))
    return findings


def _marginal(sde: SDE, flat: Flat, known: Structure, claims: Claims) -> Finding:
    """The claimed mean and deviation against those that a Gaussian process declares, else the moment equations."""
    t = sde.t0 + 0.7 * (sde.smooth_window[1] - sde.t0)
    x0, _ = probe_points(sde, flat.event, 4, tails=False, seed=9)
    if isinstance(sde, GaussianSDE):
        formula = "mean and deviation of x_t given x_0 = alpha x_0, sigma"
        mean = float(sde.alpha(t)) * x0.flatten(1)
        covariance = float(sde.sigma(t)) ** 2 * torch.eye(flat.d, dtype=torch.float64).expand(4, -1, -1)
    else:
        formula = "mean and deviation of x_t given x_0 = moment equations"
        mean, covariance = mean_and_covariance(*moments(sde, x0, t, s=sde.t0, structure=known))
    assert claims.marginal is not None
    claimed, std = (torch.as_tensor(v, dtype=torch.float64) for v in claims.marginal(x0, t))
    if claims.factor:  # of the first dimension of the event
        copies = torch.eye(flat.d // flat.event[0], dtype=torch.float64)
        spread = torch.kron(std @ std.mT, copies).expand(len(x0), flat.d, flat.d)
    else:
        spread = torch.diag_embed(std.expand(x0.shape).flatten(1) ** 2)
    gaps = _moment_gaps(claimed.expand(x0.shape).flatten(1), spread, mean, covariance)
    return _worst_moment("claimed marginal", formula, gaps, x0, t)


def _kernel_moments(sde: SDE, flat: Flat, known: Structure, kernel: Kernel) -> Finding:
    low, high = sde.smooth_window
    s = low + 0.1 * (high - low)  # inside, where no coefficient is singular
    t = s + 0.7 * (high - s)
    x0, _ = probe_points(sde, flat.event, 4, tails=False, seed=9)
    phi, shift, q = kernel(s, t)
    wanted = mean_and_covariance(*moments(sde, x0, t, s=s, structure=known))
    gaps = _moment_gaps(x0.flatten(1) @ phi.T + shift, q.expand(len(x0), *q.shape), *wanted)
    formula = "Phi x_0 + shift, Q = moment equations of the generator"
    return _worst_moment("kernel and moments", formula, gaps, x0, t)


def _moment_gaps(got: Tensor, spread: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """Relative, a sample."""
    return torch.stack([
        (got - mean).abs().amax(1) / (1 + mean.abs().amax(1)),
        (spread - covariance).abs().amax((1, 2)) / (1e-12 + covariance.abs().amax((1, 2))),
    ]).amax(0)  # fmt: skip


def _worst_moment(identity: str, formula: str, gaps: Tensor, x0: Tensor, t: float) -> Finding:
    place = int(gaps.argmax())
    where = {"x0": x0[place].flatten().tolist(), "t": t}
    note = "a standard deviation for a variance? sub-VP has sigma = 1 - alpha^2, not its root"
    return Finding.of(identity, formula, float(gaps[place]), 1e-7, where, note)


def _grid(sde: SDE, event: tuple[int, ...], known: Structure) -> Finding:
    if known.own_coordinate and event != (1,) and _accepts_line(sde):
        own = structure(sde, (1,))
        return grid_identity(sde, (1,), own.homogeneous and sde.interpretation == "ito")
    return grid_identity(sde, event, known.homogeneous and sde.interpretation == "ito")


def _facts(sde: SDE, known: Structure) -> dict[str, str]:
    """The structure and what the reversal consists of, in words."""
    own = "f" if sde.interpretation == "ito" else "f + c"
    why = ["c = 1/2 sum_k (dG_k) G_k, from the Stratonovich drift"] if own != "f" else []
    why += [] if known.additive else ["div D is there because the diffusion depends on x"]
    note = f"; {'; '.join(why)}" if why else ""
    part = "D s" if known.additive else "(div D + D s)"
    return {
        **known.words(),
        "reverse SDE": f"drift {own} - {part}, noise G (s the score, D = G G^T){note}",
        "probability flow": f"drift {own} - 1/2 {part}",
    }
