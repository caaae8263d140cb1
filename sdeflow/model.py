"""Networks that predict a part of x_t = alpha x_0 + sigma eps, and one conversion between all parts.

Every prediction is a row (a, b) of one table, value = a x_0 + b eps:

    prediction    a         b
    x0            1         0
    eps           0         1
    score         0        -1/sigma
    v            -sigma     alpha             (Salimans and Ho 2022, Progressive distillation, section 4)
    velocity      alpha'    sigma'            (the probability flow's drift; eps - x_0 for rectified flow)

With x = alpha x_0 + sigma eps, two rows and x determine each other: the value of row (c, d) is

    p x + q value,   p = (c b - d a)/(alpha b - sigma a),   q = (alpha d - sigma c)/(alpha b - sigma a).

Rows (0, b) and (0, d) need no x: p = 0 and q = d/b, where alpha = 0 too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sdeflow.checked import described, tensor
from sdeflow.gaussian import GaussianSDE
from sdeflow.kept import Kept, bits, constant
from sdeflow.network import TimeInput, checked_label, classes_of, parameters_of, time_input
from sdeflow.sde import SDE, Evaluator, checked_shape
from sdeflow.times import Each, Time, align

Prediction = Literal["x0", "eps", "score", "v", "velocity"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)
Row = tuple[Tensor, Tensor]


def check_prediction(prediction: str) -> None:
    if prediction not in PREDICTIONS:
        raise ValueError(f"unknown prediction {prediction!r}: expected one of {', '.join(PREDICTIONS)}")


def row_of(prediction: str, process: GaussianSDE, t: Tensor) -> Row:
    """(a, b) of the prediction's row at times t, float64."""
    one = torch.ones_like(t)
    if prediction == "x0":
        return one, 0 * one
    if prediction == "eps":
        return 0 * one, one
    if prediction == "score":
        return 0 * one, -1 / process.sigma(t)
    if prediction == "v":
        return -process.sigma(t), process.alpha(t)
    check_prediction(prediction)
    return process.derivatives(t)


def conversion(process: GaussianSDE, t: Tensor, given: Row, wanted: Row) -> Row:
    """(p, q) with wanted value = p x + q given value."""
    (a, b), (c, d) = given, wanted
    alpha, sigma = process.alpha(t), process.sigma(t)
    # of two rows of noise alpha cancels: any other number gives the limit where alpha = 0 makes it 0/0
    alpha = torch.where((alpha == 0) & (a == 0) & (c == 0) & (sigma > 0), 1.0, alpha)
    determinant = alpha * b - sigma * a
    return (c * b - d * a) / determinant, (alpha * d - sigma * c) / determinant


class Counter:
    """A count that copies of a model share."""

    __slots__ = ("calls",)

    def __init__(self) -> None:
        self.calls = 0


class Model:
    """A network and what it predicts, on the process it was made for.

    `model(x, t, as_="score")` evaluates the network once and converts its output; `score`, `x0`
    and `eps` are shorthands. `nfe` counts the calls of the network.

    Args:
        net: called as `net(x, time)` or `net(x, time, **conditions)`; returns the shape of x.
        sde: the process; predictions other than the score need a GaussianSDE.
        prediction: what `net` returns, a row of the table of this module.
        time: what the network is told about the time t: None for t itself, "sigma" for sigma(t)
            (EDM and VE networks), "lam" for log(alpha/sigma), "discrete" for the fractional table index
            0..N-1 of a DiscreteVP, or a function of a float64 tensor of times, such as
            `lambda t: 999 * t` for score_sde's VP networks. It is rounded to the dtype of x: a network in 16 bits
            that counts in hundreds of steps is better given float32 states, which it rounds itself.
        expand: True gives the network a (batch,) vector in the dtype of x, as networks expect;
            False gives the float64 time as the solver holds it, 0-d or (batch, 1, ..., 1), as
            closed forms want.

    Raises:
        ValueError: unknown prediction or time input, or a process that does not define it.
    """

    def __init__(
        self,
        net: Callable[..., Tensor],
        sde: SDE,
        prediction: Prediction = "eps",
        time: TimeInput = None,
        *,
        expand: bool = True,
    ) -> None:
        check_prediction(prediction)
        if not callable(net):
            raise TypeError(f"expected net to be callable as net(x, t), got {type(net).__name__}")
        if not isinstance(sde, SDE):
            raise TypeError(f"expected sde to be an SDE, got {type(sde).__name__}")
        if prediction != "score" and not isinstance(sde, GaussianSDE):
            raise ValueError(
                f"prediction {prediction!r} needs alpha and sigma of a GaussianSDE; "
                f'{type(sde).__name__} is not one: expected prediction "score"'
            )
        self.net = net
        self.sde = sde
        self.prediction = prediction
        self.expand = expand
        self.time = time
        self.conditions: dict[str, Any] = {}
        self._time_input = time_input(time, sde)
        self._counter = Counter()

    @classmethod
    def from_diffusers(
        cls,
        net: Callable[..., Any],
        scheduler_config: Any,
        *,
        time: Callable[[Tensor], Tensor] | None = None,
        clip: bool = True,
    ) -> Model:
        """A network of diffusers with what its scheduler's configuration says: the process and the prediction.

        A table of betas is a `DiscreteVP`, flow matching a `RectifiedFlow`, EDM's preconditioning (`sigma_data`) an
        `EDM`. Sampler and spacing belong to solver and grid: `integrations.diffusers_grids.diffusers_grid`.

        Args:
            net: a UNet or transformer, called as `net(x, timestep, **conditions)`; conditions by `bind`.
            scheduler_config: a scheduler, its `.config`, a dictionary, or the path of a saved one.
            time: what the network is told about a float64 tensor of times, instead of the index (flow: N t).
            clip: do what `clip_sample` or `thresholding` ask for to every x_0; False is the network alone.

        Raises:
            TypeError, ValueError: not such a network or configuration, or one whose process is none of these.
        """
        from sdeflow.integrations.diffusers_model import from_diffusers

        return from_diffusers(net, scheduler_config, time=time, clip=clip)

    def __repr__(self) -> str:
        name = getattr(self.net, "__name__", type(self.net).__name__)
        return f"Model({name}, {self.sde!r}, {self.prediction!r})"

    @property
    def nfe(self) -> int:
        """Calls of the network so far, by this model and those bound from it."""
        return self._counter.calls

    @property
    def gaussian(self) -> GaussianSDE:
        """The process, which must be a GaussianSDE.

        Raises:
            ValueError: it is not, so that there are no predictions but the score.
        """
        if not isinstance(self.sde, GaussianSDE):
            raise ValueError(f"this needs alpha and sigma of a GaussianSDE; {type(self.sde).__name__} has only a score")
        return self.sde

    def count(self, calls: int) -> None:
        """Add calls of the network that were made without this model."""
        self._counter.calls += calls

    # ---- evaluation

    def __call__(self, x: Tensor, t: Time, as_: str = "score") -> Tensor:
        """The prediction `as_` at x (batch, *event) and t (one time, or one a sample), of the shape of x."""
        check_prediction(as_)
        t = align(t, x)
        if not tensor(x):
            raise TypeError(f"expected x as a tensor of real numbers, got {described(x)}")
        value = self.raw(x, self._input(x, t))
        if as_ == self.prediction:
            return value
        process = self.gaussian
        return self.convert(x, t, value, row_of(as_, process, t))

    def score(self, x: Tensor, t: Time) -> Tensor:
        """grad log p_t(x)."""
        return self(x, t, as_="score")

    def x0(self, x: Tensor, t: Time) -> Tensor:
        """The posterior mean E[x_0 | x_t = x]."""
        return self(x, t, as_="x0")

    def eps(self, x: Tensor, t: Time) -> Tensor:
        """E[eps | x_t = x]."""
        return self(x, t, as_="eps")

    def value(self, x: Tensor, t: Tensor, wanted: Row) -> Tensor:
        """The value of any row (c, d) = c x_0 + d eps at aligned times t."""
        return self.convert(x, t, self.raw(x, self._input(x, t)), wanted)

    def convert(self, x: Tensor, t: Tensor, value: Tensor, wanted: Row) -> Tensor:
        """The row `wanted` from the network's own `value` at (x, t)."""
        p, q = conversion(self.gaussian, t, row_of(self.prediction, self.gaussian, t), wanted)
        return p.to(x.dtype) * x + q.to(x.dtype) * value

    def evaluator(self, times: Tensor, wanted: Row) -> RowEvaluator:
        """`evaluate(k, x)`: the row `wanted[k]` at times[k], every coefficient computed here, once.

        Args:
            times: (n,) float64.
            wanted: rows (c, d), each (n,).
        """
        return RowEvaluator(self, times, *self.factors(times, wanted))

    def factors(self, times: Tensor, wanted: Row) -> tuple[list[float], list[float]]:
        """(p, q) at each of `times`: the row `wanted` is p x + q value, of the network's own value.

        Raises:
            ValueError: the network's prediction does not determine it at one of the times.
        """
        given = row_of(self.prediction, self.gaussian, times)
        p, q = conversion(self.gaussian, times, given, wanted)
        bad = ~(torch.isfinite(p) & torch.isfinite(q))
        if bool(bad.any()):
            raise ValueError(
                f"the prediction {self.prediction!r} does not give what is needed at t = {float(times[bad][0]):g}, "
                f"where alpha = {float(self.gaussian.alpha(times[bad][0])):g} and sigma = "
                f"{float(self.gaussian.sigma(times[bad][0])):g}: start or end short of it, or predict x0 or v"
            )
        return p.tolist(), q.tolist()

    def time_table(self, times: Tensor) -> Tensor:
        """What the network is told about each of `times` (n,)."""
        known = constant(self.sde) and constant(self.time)
        key = (self.sde, self.time, bits(times)) if known else None
        return _TOLD.get(key, lambda: self._time_input(times))

    def asker(self, times: Tensor) -> Evaluator:
        """`ask(k, x)`: the network's own value at times[k], which it is told as it wants to be."""
        table = self.time_table(times)
        told: Each | tuple[Tensor, ...] | None = None
        raw = self.raw

        def ask(k: int, x: Tensor) -> Tensor:
            nonlocal told
            if told is None:  # to where the states are, once
                if self.expand:
                    rows = table.to(x.device, x.dtype)[:, None].expand(-1, x.shape[0])
                else:
                    rows = table.to(x.device if table.ndim > 1 else "cpu")
                told = rows.unbind() if len(rows) <= _AT_ONCE else Each(rows)
            return raw(x, told[k])

        return ask

    def raw(self, x: Tensor, time: Tensor) -> Tensor:
        """The network's own output, counted and checked for its shape."""
        self._counter.calls += 1
        value = self.net(x, time, **self.conditions_for(x))
        if not isinstance(value, Tensor):
            raise ValueError(
                f"the model returned {type(value).__name__} for x of shape {tuple(x.shape)}: expected one tensor of "
                "the shape of x; wrap the network in a function that returns it, such as lambda x, t: net(x, t)[0]"
            )
        return checked_shape(value, x, "the model")

    def conditions_for(self, x: Tensor) -> dict[str, Any]:
        """The conditions as the network is given them at x: one label for all samples becomes one a sample."""
        label = self.conditions.get("label")
        if type(label) is not int or classes_of(self.net) is None:
            return self.conditions
        return {**self.conditions, "label": torch.full((x.shape[0],), label, dtype=torch.int64, device=x.device)}

    def _input(self, x: Tensor, t: Tensor) -> Tensor:
        if x.ndim == 0:
            raise ValueError("expected x of shape (batch, *event), got a single number")
        time = self._time_input(t)
        if not isinstance(time, Tensor):
            raise ValueError(f"expected time(t) as a tensor of the shape of t, got {type(time).__name__}")
        if not self.expand:
            return time
        if time.numel() not in (1, x.shape[0]) or time.is_complex():
            got = f"{time.dtype} of shape {tuple(time.shape)}"
            raise ValueError(f"expected time(t) as real numbers of the shape of t, {tuple(t.shape)}, got {got}")
        return time.to(device=x.device, dtype=x.dtype).flatten().expand(x.shape[0])

    # ---- copies

    def bind(self, **conditions: Any) -> Model:
        """The same model with conditions passed to the network at every call.

        Tensors have one row a sample and follow their samples; other values are passed as they are. The `label` of
        this package's networks (0..classes-1, or `classes` for none) may be one number, the same for all samples.

        Raises:
            TypeError: the network does not take a condition of that name; a label that is no whole number.
            ValueError: a label that a network of this package does not have.
        """
        accepted = parameters_of(self.net)
        unknown = [name for name in conditions if accepted is not None and name not in accepted]
        if unknown:
            raise TypeError(f"the network does not take {', '.join(unknown)}: it takes {', '.join(accepted or ())}")
        classes = classes_of(self.net)
        if classes is not None and conditions.get("label") is not None:
            conditions["label"] = checked_label(conditions["label"], classes)
        model = copy.copy(self)
        model.conditions = {**self.conditions, **conditions}
        return model

    def take(self, rows: Tensor) -> Model:
        """The same model with its per-sample conditions restricted to the samples `rows`."""
        if not self.conditions:
            return self
        model = copy.copy(self)
        model.conditions = {k: v[rows] if isinstance(v, Tensor) else v for k, v in self.conditions.items()}
        return model

    def check_batch(self, batch: int) -> None:
        """Refuse per-sample conditions of another batch size than the samples'."""
        for name, value in self.conditions.items():
            if isinstance(value, Tensor) and (value.ndim == 0 or value.shape[0] != batch):
                raise ValueError(
                    f"condition {name!r}: expected one row a sample, ({batch}, ...), got {tuple(value.shape)}"
                )


_TOLD: Kept[Tensor] = Kept(64)
_AT_ONCE = 1024
"""Times up to which a tensor for each is made at once."""


class RowEvaluator:
    """`evaluate(k, x)` = p[k] x + q[k] ask(k, x): a row of the table, from what the network says at the k-th time.

    Attributes:
        p, q: floats, one of each a time.
        ask: the network's own value.
    """

    __slots__ = ("ask", "p", "q")

    def __init__(self, model: Model, times: Tensor, p: list[float], q: list[float]) -> None:
        self.p, self.q, self.ask = p, q, model.asker(times)

    def __call__(self, k: int, x: Tensor) -> Tensor:
        value, p, q = self.ask(k, x), self.p[k], self.q[k]
        if p == 0.0:
            return value if q == 1.0 else q * value
        return torch.add(q * value, x, alpha=p)


def as_model(model: Model | Callable[..., Tensor], process: SDE) -> Model:
    """A callable score(x, t) as a Model of the process; a Model is checked to be of that process."""
    if not isinstance(model, Model):
        if not callable(model):
            raise TypeError(f"expected a Model or a callable score(x, t), got {type(model).__name__}")
        return Model(model, process, "score", expand=False)
    root = process
    while hasattr(root, "process"):  # a reversal has the marginals, and so the score, of what it reverses
        root = root.process
    if model.sde is not root and model.sde != root:
        raise ValueError(f"the model was made for {model.sde!r}, not for {process!r}")
    return model
