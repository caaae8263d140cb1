"""`check_noise`: the law of a noise source's normals and paths, their independence, and whose they are.

Statistics are compared in standard errors, with the tolerance `LIMIT`: a comparison of a sound source fails with
probability 4e-8 (the one of Kolmogorov and Smirnov with 1e-7), a whole report with less than 1e-5, a seed at a time:
the same seed always gives the same report.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sdeflow.bridge import Increment
from sdeflow.checked import checked
from sdeflow.noise import AREA, PATH, PRIOR, Antithetic, Noise, NoiseSource, Seeded
from sdeflow.testing.report import Finding, Report
from sdeflow.testing.worst import Worst

F64 = torch.float64
LIMIT = 5.5
"""Standard errors: two-sided 4e-8."""
_KS_LIMIT = 2.9
"""Of sqrt(n) sup |F_n - F|: 2 exp(-2 x^2) = 1e-7."""
_WIDTH = 16
"""Components of a sample."""
_GRID = torch.linspace(0, 1, 9, dtype=F64)
_UNEVEN = torch.tensor([0.0, 0.1, 0.35, 0.4, 0.8, 1.0], dtype=F64)


# ---- a source whose normals the caller fixes


class Given(NoiseSource):
    """A source whose k-th normal, in the order of asking, is `unit(k, rows, event)`, (rows, *event).

    A walk asks for one normal an increment for W and then, with areas, one for H; a sequence for one a node. What a
    solver makes of a fixed draw is then a function to integrate or to superpose: laws without sampling.

    Attributes:
        asked: the normals that the last binding was asked for.
    """

    def __init__(self, unit: Callable[[int, int, tuple[int, ...]], Tensor]) -> None:
        self.unit, self.asked = unit, 0

    def bind(self, batch: int, index: int | Tensor | None, device: torch.device | str) -> Noise:
        self.asked = 0
        return _GivenNoise(self, batch, index, device)

    def take(self, numbers: int) -> int:
        """The number of the first of so many more."""
        first = self.asked
        self.asked += numbers
        return first


class _GivenNoise(Noise):
    def __init__(self, source: Given, batch: int, index: int | Tensor | None, device: torch.device | str) -> None:
        super().__init__(0, batch, index=index, device=device)
        self.source = source

    def normal(self, stream: int, node: int, event: Any, dtype: torch.dtype) -> Tensor:
        return self.source.unit(self.source.take(1), self.index.numel(), tuple(event)).to(dtype)

    def sequence(self, stream: int, nodes: int, event: Any, dtype: torch.dtype) -> Callable[[int], Tensor]:
        first, rows = self.source.take(nodes), self.index.numel()
        return lambda k: self.source.unit(first + k, rows, tuple(event)).to(dtype)

    def walk(
        self, times: Tensor, event: Any, dtype: torch.dtype, *, areas: bool = False, lengths: Tensor | None = None
    ) -> Any:
        return _GivenWalk(self, torch.diff(times).abs() if lengths is None else lengths, tuple(event), dtype, areas)


class _GivenWalk:
    def __init__(
        self, noise: _GivenNoise, lengths: Tensor, event: tuple[int, ...], dtype: torch.dtype, areas: bool
    ) -> None:
        self.lengths, self._source, self._rows = lengths, noise.source, noise.index.numel()
        self._first, self._event, self._dtype, self._areas = self._source.take(lengths.numel()), event, dtype, areas
        self._area = self._source.take(lengths.numel()) if areas else 0

    def __call__(self, k: int) -> Increment:
        size = float(self.lengths[k]) ** 0.5
        w = size * self._source.unit(self._first + k, self._rows, self._event).to(self._dtype)
        if not self._areas:
            return Increment(w, None)
        h = size / math.sqrt(12) * self._source.unit(self._area + k, self._rows, self._event)
        return Increment(w, h.to(self._dtype))


# ---- draws


def _path(
    noise: Noise, times: Tensor, *, areas: bool, dtype: torch.dtype = F64, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """(W, H or None, lengths) of the grid's intervals: (steps, batch, width) each, and (steps,)."""
    walk = noise.walk(times, (_WIDTH,), dtype, areas=areas, lengths=lengths)
    w, h = [], []
    for k in range(times.numel() - 1):  # the walk's memory may be used again
        part = walk(k)
        w.append(part.w.clone())
        if part.h is not None:
            h.append(part.h.clone())
    return torch.stack(w), torch.stack(h) if h else None, walk.lengths.to(F64)


def _per(lengths: Tensor) -> Tensor:
    return lengths.sqrt()[:, None, None]


def _standard(noise: Noise, rows: slice) -> dict[str, Tensor]:
    """What should be standard normals, (nodes, samples, width): increments, areas and draws by node."""
    w, _, lengths = _path(noise, _GRID, areas=False)
    v, h, own = _path(noise, _UNEVEN, areas=True)
    clock = torch.tensor([0.02, 3.0, 0.5, 0.5, 0.7, 0.01, 1.0, 2.0], dtype=F64)
    u, _, clocked = _path(noise, _GRID, areas=False, lengths=clock)
    nodes = torch.stack([noise.normal(PRIOR, k, (_WIDTH,), F64) for k in range(4)])
    found = {"W": w / _per(lengths), "W with areas": v / _per(own), "W of a clock": u / _per(clocked), "normal": nodes}
    if h is not None:
        found["H"] = h / _per(own / 12)
    return {name: z[:, rows] for name, z in found.items()}


def _scores(z: Tensor) -> dict[str, float]:
    """Standard errors by which the moments of z are off."""
    n = z.numel()
    moments = (("mean", 1, 0, 1), ("variance", 2, 1, 2), ("skewness", 3, 0, 15), ("kurtosis", 4, 3, 96))
    return {name: abs(float((z**p).mean()) - mean) / math.sqrt(v / n) for name, p, mean, v in moments}


def _distance(z: Tensor) -> float:
    """sqrt(n) sup |F_n - F| of Kolmogorov and Smirnov."""
    u = torch.special.ndtr(torch.sort(z.flatten()).values)
    rank = torch.arange(len(u) + 1, dtype=F64) / len(u)
    return math.sqrt(len(u)) * float(torch.maximum((u - rank[:-1]).abs(), (rank[1:] - u).abs()).max())


def _dependence(a: Tensor, b: Tensor) -> float:
    """Standard errors of the correlation of two standard normals, of their values or of their squares."""
    n = math.sqrt(a.numel())
    return max(abs(float((a * b).mean())) * n, abs(float(((a**2 - 1) * (b**2 - 1)).mean())) / 2 * n)


# ---- identities


def _law(numbers: dict[str, Tensor]) -> list[Finding]:
    worst = {name: Worst() for name in ("mean", "variance", "skewness", "kurtosis")}
    shape = Worst()
    for what, z in numbers.items():
        for name, score in _scores(z).items():
            worst[name].add(score, of=what, numbers=z.numel())
        shape.add(_distance(z), of=what, numbers=z.numel())
    notes = {
        "mean": "a shift", "variance": "normals or lengths of the wrong scale (H has the variance length/12)",
        "skewness": "no normal law", "kurtosis": "no normal law: bounded, or a mixture of scales",
    }  # fmt: skip
    values = {"mean": "0", "variance": "1", "skewness": "0", "kurtosis": "3"}
    out = [
        worst[name].finding(name, f"|{name} - {values[name]}| in standard errors", LIMIT, notes[name])
        for name in worst
    ]  # fmt: skip
    out.append(shape.finding("distribution", "sqrt(n) sup |F_n - F|", _KS_LIMIT, "no normal law"))
    return out


def _independence(numbers: dict[str, Tensor], other: dict[str, Tensor] | None) -> list[Finding]:
    samples, nodes, parts, seeds, areas = (Worst() for _ in range(5))
    for what, z in numbers.items():
        for lag in (1, 2, 3):
            samples.add(_dependence(z[:, lag:], z[:, :-lag]), of=what, lag=lag)
            nodes.add(_dependence(z[lag:], z[:-lag]), of=what, lag=lag)
            parts.add(_dependence(z[..., lag:], z[..., :-lag]), of=what, lag=lag)
        if other is not None:
            seeds.add(_dependence(z, other[what]), of=what)
    if "H" in numbers:
        areas.add(_dependence(numbers["W with areas"], numbers["H"]))
    formula = "correlation of values and of squares, in standard errors"
    return [
        samples.finding("samples independent", formula, LIMIT, "samples share numbers, or keys that are too near"),
        nodes.finding("nodes independent", formula, LIMIT, "increments of a path overlap, or share numbers"),
        parts.finding("components independent", formula, LIMIT, "components share numbers"),
        seeds.finding(
            "seeds independent", formula, LIMIT, "the seed is ignored or only shifts the numbers",
            "the source has no `seed` to replace"),
        areas.finding(
            "W and H uncorrelated", formula, LIMIT, "the integral of the path where its bridge's belongs",
            "the source's walks have no areas"),
    ]  # fmt: skip


def _gathered(w: Tensor, h: Tensor | None, lengths: Tensor, ends: list[int]) -> tuple[Tensor, Tensor | None]:
    """(W, H) over runs of intervals, by W = sum W_k and L (W/2 + H) = int (W_u - W_0) du (Chen's relation)."""
    whole_w, whole_h = [], []
    for first, last in pairwise(ends):
        position, integral = torch.zeros_like(w[0]), torch.zeros_like(w[0])
        for k in range(first, last):
            if h is not None:
                integral = integral + lengths[k] * (position + 0.5 * w[k] + h[k])
            position = position + w[k]
        whole_w.append(position)
        whole_h.append(integral / lengths[first:last].sum() - 0.5 * position)
    return torch.stack(whole_w), None if h is None else torch.stack(whole_h)


def _one_path(noise: Noise) -> list[Finding]:
    """Coarse increments from fine ones: on any times for one path, on halved intervals otherwise."""
    additive, chen = Worst(), Worst()
    halved = torch.sort(torch.cat([_UNEVEN, 0.5 * (_UNEVEN[1:] + _UNEVEN[:-1])])).values
    cases = [("halves", _UNEVEN, halved, list(range(0, 11, 2)))]
    cases.append(("three in six", torch.linspace(0, 1, 4, dtype=F64), torch.linspace(0, 1, 7, dtype=F64), [0, 2, 4, 6]))
    if noise.one_path:
        cases.append(("any times", torch.tensor([0.0, 0.4, 1.0], dtype=F64), _UNEVEN, [0, 3, 5]))
        cases.append(("the whole", torch.tensor([0.0, 1.0], dtype=F64), _UNEVEN, [0, 5]))
    for name, coarse, fine, ends in cases:
        for areas in (False, True):
            w, h, _ = _path(noise, coarse, areas=areas)
            v, g, lengths = _path(noise, fine, areas=areas)
            sums, areas_of = _gathered(v, g, lengths, ends)
            additive.add(float((sums - w).abs().max()), grids=name, areas=areas)
            if h is not None and areas_of is not None:
                chen.add(float((areas_of - h).abs().max()), grids=name)
    scope = "any grids" if noise.one_path else "grids that halve each other"
    note = "coarse and fine grids see two paths: strong errors between them mean nothing"
    formula = f"W(a, c) = W(a, b) + W(b, c) on {scope}"
    chens = "L (W/2 + H) = int (W_u - W_a) du over the parts"
    return [
        additive.finding("additive", formula, 1e-12, note),
        # one path tells times apart to 2^-40 of its span, and the integral has their lengths in it
        chen.finding("Chen's relation", chens, 1e-11 if noise.one_path else 1e-12, note, "the walks have no areas"),
    ]


def _ownership(source: NoiseSource, samples: int) -> list[Finding]:
    """That a sample's numbers are its own, whatever is asked beside and before them."""
    bits, order, single, replay = Worst(), Worst(), Worst(), Worst()

    def draws(batch: int, index: int | Tensor | None, dtype: torch.dtype = F64) -> dict[str, Tensor]:
        noise = source.bind(batch, index, "cpu")
        found = {}
        for name, grid, areas in (("W", _GRID, False), ("W and H", _UNEVEN, True)):
            w, h, _ = _path(noise, grid, areas=areas, dtype=dtype)
            found[name] = w if h is None else torch.cat([w, h])
        found["normal"] = torch.stack([noise.normal(s, 3, (_WIDTH,), dtype) for s in (PATH, PRIOR, AREA)])
        drawn = noise.sequence(PRIOR, 5, (_WIDTH,), dtype)
        found["sequence"] = torch.stack([drawn(k).clone() for k in range(5)])
        return found

    count = min(samples, 64)
    whole = draws(count, None)
    permuted = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    cases: list[tuple[str, int, int | Tensor | None, Tensor]] = [
        ("alone", 1, torch.tensor([5]), torch.tensor([5])), ("shard", 7, 12, torch.arange(12, 19)),
        ("permuted", count, permuted, permuted), ("odd batch", 3, None, torch.arange(3)),
    ]  # fmt: skip
    for name, batch, index, rows in cases:
        part = draws(batch, index)
        for what, z in part.items():
            bits.add(float((z != whole[what][:, rows]).to(F64).mean()), samples=name, of=what)
    for what, z in draws(count, None).items():
        replay.add(float((z != whole[what]).to(F64).mean()), of=what)
    noise = source.bind(count, None, "cpu")
    backwards = [noise.normal(PRIOR, k, (_WIDTH,), F64) for k in reversed(range(5))][::-1]
    drawn = source.bind(count, None, "cpu").sequence(PRIOR, 5, (_WIDTH,), F64)
    for k, z in enumerate(backwards):
        order.add(float((z != drawn(k)).to(F64).mean()), node=k)
    for what, z in draws(count, None, torch.float32).items():
        single.add(float((z.to(F64) - whole[what]).abs().max()), of=what)
    note = "numbers by position in the batch, or drawn in order from one generator"
    return [
        bits.finding("belongs to the sample", "alone, in a shard, permuted: the same bits (share)", 0, note),
        order.finding("order of queries", "nodes backwards = nodes in a sequence (share that differs)", 0, note),
        replay.finding("replay", "bind twice: the same bits (share that differs)", 0, "a generator that moves on"),
        # a uniform near 1 rounds to 2^-25, and its radius to 2^-12
        single.finding("float32", "|float32 - float64|", 3e-4, "float32 draws other numbers than float64"),
    ]  # fmt: skip


def _opposite(source: NoiseSource, noise: Noise) -> Finding:
    identity, formula = "antithetic pairs", "z(2j) + z(2j + 1) = 0 (largest)"
    if not isinstance(source, Antithetic):
        return Finding.skipped(identity, formula, "the source is not Antithetic")
    worst = Worst()
    for name, grid, areas in (("W", _GRID, False), ("W and H", _UNEVEN, True)):
        w, h, _ = _path(noise, grid, areas=areas)
        z = w if h is None else torch.cat([w, h])
        even = z.shape[1] // 2 * 2
        worst.add(float((z[:, 0:even:2] + z[:, 1:even:2]).abs().max()), of=name)
    z = noise.normal(PRIOR, 0, (_WIDTH,), F64)
    worst.add(float((z[0 : len(z) // 2 * 2 : 2] + z[1::2]).abs().max()), of="normal")
    return worst.finding(identity, formula, 0, "pairs by position instead of index, or a stream that keeps its sign")


def _reseeded(source: Any) -> NoiseSource | None:
    """The source with the next seed, if it is a dataclass with one."""
    known = getattr(source, "seed", None)
    if not dataclasses.is_dataclass(source) or isinstance(source, type) or not isinstance(known, int):
        return None
    return dataclasses.replace(source, seed=known + 1)  # type: ignore[return-value]


@checked
def check_noise(source: NoiseSource | None = None, *, seed: int = 0, samples: int = 4096) -> Report:
    """Hold a noise source to the law of Brownian motion, and to noise that belongs to the sample.

    Over each interval of length L, W ~ N(0, L) and, with areas, H ~ N(0, L/12), independent of each other and of the
    other intervals, samples and components; W adds up and H follows Chen's relation, on any two grids for a source
    of one path (`one_path` of its noise) and on grids that halve each other otherwise.

    Args:
        source: `Seeded(seed)` unless given; `SamePath`, `Antithetic`, or your own.
        seed: of the default source.
        samples: samples of the statistics, each of 16 components, at least 64: 4096 show a variance that is off by 2%.

    Raises:
        TypeError: `source` is no `NoiseSource`.
        ValueError: too few samples.
    """
    source = Seeded(seed) if source is None else source
    if not isinstance(source, NoiseSource):
        raise TypeError(f"expected a NoiseSource such as sf.SamePath(seed), got {source!r}")
    if samples < 64:
        raise ValueError(f"expected samples >= 64, got {samples}")
    noise = source.bind(samples, None, "cpu")
    first = noise.normal(PRIOR, 0, (_WIDTH,), F64)
    # of two opposite samples the law is in one of them
    rows = slice(0, None, 2) if torch.equal(first[0], -first[1]) else slice(None)
    numbers = _standard(noise, rows)
    other = None
    neighbour = _reseeded(source)
    if neighbour is not None:
        other = _standard(neighbour.bind(samples, None, "cpu"), rows)
    findings = _law(numbers) + _independence(numbers, other) + _one_path(source.bind(min(samples, 64), None, "cpu"))
    findings += _ownership(source, samples)
    findings.append(_opposite(source, source.bind(samples, None, "cpu")))
    facts = {"numbers": f"{sum(z.numel() for z in numbers.values())}", "limit": f"{LIMIT} standard errors (4e-8 each)"}
    return Report(f"noise of {source!r}", tuple(findings), facts)
