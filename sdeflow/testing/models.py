"""`check_model`: that a model's predictions are one prediction, that its samples do not see each other, and its score.

Conversions are held to formulas written here, alpha' and sigma' by finite differences. Nothing here knows the data
unless `log_density` or `samples` are given; without them a model of the wrong data passes, one of the wrong sign or
scale is caught at the noise end alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sdeflow.checked import checked, event_shape
from sdeflow.gaussian import GaussianSDE
from sdeflow.model import PREDICTIONS, Model, as_model
from sdeflow.sde import SDE
from sdeflow.testing.report import Finding, Report
from sdeflow.testing.worst import Worst

F64 = torch.float64
LIMIT = 5.5
"""Standard errors of what is a mean over samples: two-sided 4e-8 a component."""
LogDensity = Callable[[Tensor, float], Tensor]
"""`log_density(x, t)`: log p_t at states (batch, *event), (batch,), differentiable in x."""


class _Subject:
    """The model with the states and times at which it is evaluated."""

    def __init__(self, model: Model, event: tuple[int, ...], points: int, seed: int) -> None:
        self.model, self.process, self.event, self.rows = model, model.sde, event, points
        share = torch.sort(torch.frac(torch.arange(1, 6, dtype=F64) * 0.6180339887)).values
        low, high = self.process.t_min, self.process.t0 + 0.95 * (self.process.t1 - self.process.t0)
        self.times = (low + (high - low) * share).tolist()
        generator = torch.Generator().manual_seed(seed)
        self.normal = torch.randn(points, *event, dtype=F64, generator=generator)
        self.dtype = self._dtype()

    def _dtype(self) -> torch.dtype:
        """float64, or float32 for a network whose parameters are."""
        try:
            with torch.no_grad():
                self.model.raw(self.normal, self.model._input(self.normal, torch.tensor(self.times[0], dtype=F64)))
        except RuntimeError:
            return torch.float32
        return F64

    def x(self, t: float, scale: float = 1.3) -> Tensor:
        """States somewhat wider than unit data noised to t."""
        if isinstance(self.process, GaussianSDE):
            scale = scale * math.hypot(float(self.process.alpha(t)), float(self.process.sigma(t)))
        return (scale * self.normal).to(self.dtype)

    def at(self, x: Tensor, t: Any, as_: str = "score") -> Tensor:
        with torch.no_grad():
            return self.model(x, t, as_=as_)

    def either(self, double: float, single: float) -> float:
        """A tolerance for its dtype: networks in float32 sum thousands of rounded terms."""
        return double if self.dtype == F64 else single

    def of(self, rows: Tensor, x: Tensor, t: Any) -> Tensor:
        """The score of some samples alone."""
        with torch.no_grad():
            return self.model.take(rows)(x[rows], t)

    def in_float32(self, t: float) -> Tensor | None:
        """The score of float32 states, None for a network that takes float64 or float32 alone."""
        if self.dtype != F64:
            return None
        try:
            return self.at(self.x(t).float(), t)
        except RuntimeError:
            return None

    @property
    def readings(self) -> tuple[str, ...]:
        """The predictions it can be read as."""
        return PREDICTIONS if isinstance(self.process, GaussianSDE) else ("score",)


def _relative(a: Tensor, b: Tensor) -> float:
    """max |a - b| over max |b|; infinite where one is not finite."""
    a, b = a.detach().to(F64), b.detach().to(F64)
    if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
        return math.inf
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-300)


# ---- identities of any model


def _conversions(subject: _Subject) -> list[Finding]:
    """Each relation of the table, from readings of the model."""
    formulas = {
        "x from x0 and eps": "x = alpha x0 + sigma eps", "score from eps": "score = -eps/sigma",
        "v from x0 and eps": "v = alpha eps - sigma x0",
        "velocity from x0 and eps": "velocity = alpha' x0 + sigma' eps",
    }  # fmt: skip
    process = subject.process
    if not isinstance(process, GaussianSDE):
        why = "the process has no alpha and sigma: its model is a score"
        return [Finding.skipped(name, formula, why) for name, formula in formulas.items()]
    worst = {name: Worst() for name in formulas}
    for t in subject.times:
        x = subject.x(t)
        read = {name: subject.at(x, t, name).to(F64) for name in PREDICTIONS}
        alpha, sigma = float(process.alpha(t)), float(process.sigma(t))
        step = 1e-5 * (process.t1 - process.t0)
        slopes = [float((f(t + step) - f(t - step)) / (2 * step)) for f in (process.alpha, process.sigma)]
        x0, eps = read["x0"], read["eps"]
        sides = {
            "x from x0 and eps": (alpha * x0, sigma * eps, x.to(F64)),
            "score from eps": (-eps / sigma, 0 * eps, read["score"]),
            "v from x0 and eps": (alpha * eps, -sigma * x0, read["v"]),
            "velocity from x0 and eps": (slopes[0] * x0, slopes[1] * eps, read["velocity"]),
        }
        for name, (first, second, value) in sides.items():
            size = float((first.abs() + second.abs() + value.abs()).max())
            worst[name].add(float((first + second - value).abs().max()) / max(size, 1e-300), t=t)
    notes = "a reading overridden, a sign, or alpha and sigma of another time"
    rounding = subject.either(1e-9, 1e-3)
    return [
        # differences of step 1e-5 are good to 1e-10 of the third derivative, and rounding of 1e-11
        worst[name].finding(name, formula, max(rounding, 1e-6) if "velocity" in name else rounding, notes)
        for name, formula in formulas.items()
    ]  # fmt: skip


def _contract(subject: _Subject, expected: int | None) -> list[Finding]:
    """Shapes, dtypes, times, batches and calls; `expected` calls of networks a reading, None for the first's."""
    kept, single, times, batch, untouched, calls = (Worst() for _ in range(6))
    model, count = subject.model, subject.rows
    for t in subject.times:
        x = subject.x(t)
        whole = subject.at(x, t)
        before, made = x.clone(), expected
        for name in subject.readings:
            seen = model.nfe
            value = subject.at(x, t, name)
            rise = model.nfe - seen
            made = max(rise, 1) if made is None else made  # a reading that counts nothing is past the counter
            calls.add(abs(rise - made), reading=name, calls=rise, t=t)
            kept.add(float(value.shape != x.shape or value.dtype != x.dtype), reading=name, t=t)
        untouched.add(float((x != before).any()), t=t)
        low = subject.in_float32(t)
        if low is not None:
            kept.add(float(low.shape != x.shape or low.dtype != torch.float32), dtype=str(low.dtype), t=t)
            single.add(_relative(low, subject.at(x.float().to(F64), t)), t=t)
        times.add(_relative(subject.at(x, torch.full((count,), t, dtype=F64)), whole), t=t)
        for name, rows in _parts(count):
            try:
                batch.add(_relative(subject.of(rows, x, t), whole[rows]), samples=name, t=t)
            except (ValueError, RuntimeError) as error:  # batch normalisation of one sample
                batch.add(math.inf, samples=name, t=t, error=str(error))
    mixed = torch.tensor([subject.times[i % len(subject.times)] for i in range(count)], dtype=F64)
    x = subject.x(subject.times[-1])
    together = subject.at(x, mixed)
    for i in range(min(count - 1, 5)):
        alone = subject.of(torch.arange(i, i + 2), x, mixed[i : i + 2])
        times.add(_relative(together[i : i + 2], alone), sample=i, t=float(mixed[i]))
    tight = subject.either(1e-11, 1e-3)
    return [
        kept.finding("shape and dtype", "those of x", 0, "times or constants in float64 promote the state"),
        single.finding(
            "float32", "|s(float32) - s(float64)| / |s|", 1e-4, "the network is told the time in few digits",
            "the network takes one dtype alone"),
        times.finding(
            "time per sample", "s(x, (t, ..., t)) = s(x, t), and sample by sample", tight,
            "the first time of a batch is taken for all, or times are broadcast along the event"),
        batch.finding(
            "batch", "s of sample i alone, in a part, permuted", tight,
            "statistics over the batch: batch normalisation in training mode, a mean over samples; or dropout"),
        untouched.finding("input untouched", "x after = x before", 0, "the network writes into its input"),
        calls.finding(
            "calls counted", f"nfe rises by {'as much' if expected is None else expected} a reading", 0,
            "a call past the counter, or one repeated; a guided model asks several networks: set calls="),
    ]  # fmt: skip


def _parts(count: int) -> list[tuple[str, Tensor]]:
    permuted = torch.randperm(count, generator=torch.Generator().manual_seed(1))
    return [
        ("alone", torch.tensor([count // 2])), ("a part", torch.arange(count // 3, count // 3 + 2)),
        ("permuted", permuted),
    ]  # fmt: skip


def _ends(subject: _Subject) -> list[Finding]:
    """Finite near both ends; and where noise is all there is, its score."""
    finite, noise = Worst(), Worst()
    process = subject.process
    span = process.t1 - process.t0
    for t in (process.t_min, process.t_min + 1e-3 * span, process.t1 - 1e-3 * span):
        value = subject.at(subject.x(t), t)
        finite.add(float((~torch.isfinite(value)).to(F64).mean()), t=t)
    why = "the process is no GaussianSDE, or its data are still there at the end"
    t = process.t1 - 0.01 * span
    if isinstance(process, GaussianSDE) and float(process.alpha(t) / process.sigma(t)) < 0.1:
        sigma = float(process.sigma(t))
        x = (sigma * subject.normal).to(subject.dtype)
        pull = -(sigma**2) * float((subject.at(x, t).to(F64) * x).sum() / (x.to(F64) ** 2).sum())
        noise.add(abs(pull - 1), t=t, pull=pull)
    return [
        finite.finding("finite at the ends", "share of values that are not finite", 0, "a division by sigma or alpha"),
        noise.finding(
            "noise end", "|<-sigma^2 s, x>/<x, x> - 1| near t1", 0.3,
            "the wrong sign, a factor (alpha, sigma) too many, or another prediction than declared", why),
    ]  # fmt: skip


def _conditions(subject: _Subject) -> Finding:
    identity, formula = "conditions", "take(rows)(x[rows]) = model(x)[rows], and bind again is the same"
    model = subject.model
    if not model.conditions:
        return Finding.skipped(identity, formula, "the model has no conditions bound")
    worst = Worst()
    rows = torch.arange(subject.rows - 1, -1, -2)
    for t in subject.times:
        x = subject.x(t)
        whole = subject.at(x, t)
        with torch.no_grad():
            worst.add(_relative(subject.of(rows, x, t), whole[rows]), of="take", t=t)
            worst.add(_relative(model.bind(**model.conditions)(x, t), whole), of="bind", t=t)
    return worst.finding(identity, formula, subject.either(1e-11, 1e-3), "conditions do not follow their samples")


# ---- identities of a score


def _gradient_field(subject: _Subject, exact: bool, seed: int) -> tuple[Finding, str | None]:
    """(the finding, a warning): u.J v = v.J u by two vector-Jacobian products a pair of directions."""
    identity, formula = "gradient field", "|u.J v - v.J u| / (|J^T u| |v| + |J^T v| |u|), J = ds/dx"
    note = "no gradient of a density: noise that is not reversed exactly; trained networks are off by some per cent"
    worst, generator = Worst(), torch.Generator().manual_seed(seed)
    if math.prod(subject.event) == 1:
        return Finding.skipped(identity, formula, "every score of one component is a gradient"), None
    for t in subject.times:
        leaf = subject.x(t).requires_grad_()
        value = subject.model(leaf, t)
        if not value.requires_grad:
            return Finding.skipped(identity, formula, "the model is not differentiable in x"), None
        for _ in range(4):
            u, v = (torch.randn(leaf.shape, dtype=F64, generator=generator).to(leaf.dtype) for _ in range(2))
            back = [torch.autograd.grad(value, leaf, w, retain_graph=True)[0].flatten(1).to(F64) for w in (u, v)]
            one, other = u.flatten(1).to(F64), v.flatten(1).to(F64)
            gap = ((back[0] * other).sum(1) - (back[1] * one).sum(1)).abs()
            size = back[0].norm(dim=1) * other.norm(dim=1) + back[1].norm(dim=1) * one.norm(dim=1)
            share = gap / size.clamp(min=1e-300)
            worst.add(float(share.max()), t=t, sample=int(share.argmax()))
    tolerance = subject.either(1e-9, 1e-3)
    if exact:
        return worst.finding(identity, formula, tolerance, note), None
    why = f"asymmetry {worst.residual:.1e}: a warning for a trained network; exact=True makes it an identity"
    large = not worst.residual <= tolerance
    warning = f"gradient field: the score's Jacobian is asymmetric by {worst.residual:.1e}, so it is no gradient"
    return Finding.skipped(identity, formula, why), warning if large else None


def _density(subject: _Subject, log_density: LogDensity | None) -> Finding:
    identity, formula = "score of the density", "s = grad log p_t, relative to the largest"
    if log_density is None:
        return Finding.skipped(identity, formula, "no log_density is given")
    worst = Worst()
    for t in subject.times:
        leaf = subject.x(t).to(F64).requires_grad_()
        (want,) = torch.autograd.grad(log_density(leaf, t).sum(), leaf)
        worst.add(_relative(subject.at(leaf.detach().to(subject.dtype), t), want), t=t)
    note = "the wrong sign, a factor alpha or sigma, another time than t, another prediction than declared"
    return worst.finding(identity, formula, subject.either(1e-8, 1e-2), note)


def _stein(subject: _Subject, samples: Tensor | None, seed: int) -> Finding:
    """E s(x_t) = 0 and E x.s(x_t) = -dim over x_t from the data."""
    identity, formula = "Stein", "E s = 0 and E x.s = -D over samples, in standard errors"
    process = subject.process
    if samples is None:
        return Finding.skipped(identity, formula, "no samples are given")
    if not isinstance(process, GaussianSDE):
        return Finding.skipped(identity, formula, "only a GaussianSDE noises samples to a time in one step")
    if tuple(samples.shape[1:]) != subject.event or samples.shape[0] < 100:
        raise ValueError(f"expected at least 100 samples of shape {subject.event}, got {tuple(samples.shape)}")
    worst, generator = Worst(), torch.Generator().manual_seed(seed)
    data = samples.to(F64)
    for t in subject.times:
        eps = torch.randn(data.shape, dtype=F64, generator=generator)
        x = float(process.alpha(t)) * data + float(process.sigma(t)) * eps
        score = subject.at(x.to(subject.dtype), t).to(F64).flatten(1)
        pull = (score * x.flatten(1)).sum(1, keepdim=True) + score.shape[1]
        values = torch.cat([score, pull], dim=1)
        error = values.std(0) / math.sqrt(len(values))
        worst.add(float((values.mean(0).abs() / error.clamp(min=1e-300)).max()), t=t)
    note = "a score of other data, the wrong sign or scale (for a trained network: its error, seen with many samples)"
    return worst.finding(identity, formula, LIMIT, note)


# ---- the whole


@checked
def check_model(
    model: Model | Callable[..., Tensor],
    *,
    log_density: LogDensity | None = None,
    event: tuple[int, ...] | None = None,
    process: SDE | None = None,
    points: int = 64,
    seed: int = 0,
    exact: bool = False,
    samples: Tensor | None = None,
    calls: int | None = 1,
) -> Report:
    """Hold a model, or a score, to what `solve` takes for granted and, where the data are known, to its density.

    A model whose conditions are tensors is evaluated on as many states as they have rows. A network of float32
    parameters is checked in float32, with the tolerances of that.

    Args:
        model: a `Model`, or a callable score(x, t) of `process`.
        log_density: log p_t(x) as `log_density(x, t)`, differentiable in x: the score must be its gradient.
        event: shape of one sample; the process's own `event` unless given.
        process: of a callable score; a `Model` has its own.
        points: states a time, at 5 times.
        seed: of the states.
        exact: an asymmetric Jacobian of the score is a failure (closed forms), not a warning (trained networks).
        samples: data (n, *event): the score must have mean 0 and E[x.s] = -D over them, noised; within 5.5 standard
            errors, which a sound one leaves with probability 4e-8 a component and time.
        calls: of networks that one reading makes: 2 for classifier-free guidance. None asks only for one or more, and
            for as many by every reading of a time, as where guidance has an interval.

    Raises:
        TypeError: a callable without a process.
        ValueError: no event is known, `process` is not the model's, or calls < 1.
    """
    if calls is not None and calls < 1:
        raise ValueError(f"expected calls >= 1, or None, got {calls!r}")
    if not isinstance(model, Model) and process is None:
        raise TypeError("expected process= with a callable score(x, t)")
    known = model if isinstance(model, Model) and process is None else as_model(model, process)  # type: ignore[arg-type]
    event = event if event is not None else known.sde.event
    if event is None:
        raise ValueError(f"expected event=, the shape of one sample: {known.sde!r} has none of its own")
    points = int(points)  # small integers of numpy would wrap in the products below
    if not 4 <= points <= 1_000_000:
        raise ValueError(f"expected points >= 4, got {points} (at most a million)")
    rows = [len(v) for v in known.conditions.values() if isinstance(v, Tensor)]
    subject = _Subject(known, event_shape(event, 5 * points), rows[0] if rows else points, seed)
    field, warning = _gradient_field(subject, exact, seed)
    findings = [*_conversions(subject), *_contract(subject, calls), *_ends(subject), _conditions(subject), field]
    findings.append(_density(subject, log_density))
    # conditions belong to their own samples, not to those of the data
    findings.append(_stein(subject, None if rows else samples, seed))
    facts = {
        "event": str(tuple(event)), "evaluated in": str(subject.dtype).removeprefix("torch."),
        "times": ", ".join(f"{t:.3g}" for t in subject.times),
    }  # fmt: skip
    return Report(repr(known), tuple(findings), facts, () if warning is None else (warning,))
