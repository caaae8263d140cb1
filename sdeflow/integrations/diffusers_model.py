"""Networks of diffusers as models: `Model.from_diffusers(net, scheduler_config)`."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.combined import Combination, Guided
from sdeflow.gaussian import GaussianSDE
from sdeflow.integrations.diffusers_config import (
    clipping_of,
    kind_of,
    needed,
    prediction_of,
    process_of,
    read_config,
)
from sdeflow.model import Model
from sdeflow.network import TimeInput, parameters_of
from sdeflow.sde import checked_shape
from sdeflow.times import as_time


class DiffusersNet(nn.Module):
    """A network called as diffusers does, `net(x, timestep, **conditions)`, as one of `Model`.

    It is told the time as (batch,) in float32 (float64 with float64 states): fractional where the solver's time lies
    between entries of the table, never rounded to an entry, and never in 16 bits, which know no 999. x is cast to the
    dtype of the network's parameters and the output back, so that a 16-bit network takes float32 states. The output
    may be a tensor, a tuple, or an object with `.sample`; of twice as many channels as x (a learned variance) the
    first half is taken.

    Args:
        net: a `UNet2DModel`, `UNet2DConditionModel`, transformer, or any callable with that signature.
    """

    def __init__(self, net: Callable[..., Any]) -> None:
        super().__init__()
        self.net = net
        self._accepted = parameters_of(net)
        self._time_name = "timestep" if self._accepted is not None and "timestep" in self._accepted else None

    def forward(self, x: Tensor, time: Tensor, **conditions: Any) -> Tensor:
        """The network's output of the shape of x, at times 0-d or one a sample.

        Args:
            conditions: as the network takes them; entries of a dictionary of tensors by a dotted name, such as
                "added_cond_kwargs.text_embeds", so that each row stays with its sample.
        """
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        told = time.to(device=x.device, dtype=wide).flatten().expand(x.shape[0])
        given = x.to(self._dtype(x))
        if self._time_name is None:
            output = self.net(given, told, **self._named(conditions))
        else:
            output = self.net(given, timestep=told, **self._named(conditions))
        output = getattr(output, "sample", output)
        output = output[0] if isinstance(output, tuple) else output
        if isinstance(output, Tensor) and output.ndim > 1 and output.shape[1] == 2 * x.shape[1]:
            output = output[:, : x.shape[1]]
        return checked_shape(output, given, "the network").to(x.dtype)

    def _dtype(self, x: Tensor) -> torch.dtype:
        first = next(self.net.parameters(), None) if isinstance(self.net, nn.Module) else None
        return first.dtype if first is not None and first.is_floating_point() else x.dtype

    def _named(self, conditions: dict[str, Any]) -> dict[str, Any]:
        """The conditions, dotted names gathered in dictionaries."""
        named: dict[str, Any] = {}
        for key, value in conditions.items():
            name, _, entry = key.partition(".")
            if self._accepted is not None and name not in self._accepted:
                raise TypeError(f"the network does not take {name}: it takes {', '.join(self._accepted)}")
            if isinstance(value, dict) and any(isinstance(v, Tensor) for v in value.values()):
                raise ValueError(
                    f"condition {name!r}: expected its tensors by dotted names, so that rows stay with their samples: "
                    f"bind(**{{'{name}.{next(iter(value))}': ...}}), got a dictionary"
                )
            if entry:
                named.setdefault(name, {})[entry] = value
            else:
                named[name] = value
        return named


class EDMDenoiser(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, log(sigma)/4), a prediction of x_0 (Karras et al. 2022, EDM, table 1).

    c_skip = d^2/(sigma^2 + d^2), c_out = +-sigma d/sqrt(sigma^2 + d^2), c_in = 1/sqrt(sigma^2 + d^2), d = sigma_data.

    Args:
        net: F, called as `net(x, time, **conditions)`.
        sign: of c_out: 1, or -1 for what diffusers calls "v_prediction" here.
    """

    def __init__(self, net: DiffusersNet, sigma_data: float, sign: float) -> None:
        super().__init__()
        self.net, self.sigma_data, self.sign = net, sigma_data, sign

    def forward(self, x: Tensor, sigma: Tensor, **conditions: Any) -> Tensor:
        radius = torch.sqrt(sigma**2 + self.sigma_data**2)
        skip, out = self.sigma_data**2 / radius**2, self.sign * sigma * self.sigma_data / radius
        value = self.net((1 / radius).to(x.dtype) * x, torch.log(sigma) / 4, **conditions)
        return skip.to(x.dtype) * x + out.to(x.dtype) * value


class _Clipped(Combination):
    """A model whose x_0 is clipped, and every other prediction derived from that."""

    def __init__(self, model: Model, clip: Callable[[Tensor], Tensor]) -> None:
        super().__init__({"model": model})
        self.clip, self.process = clip, model.gaussian
        self.blind = model.prediction == "eps" and float(self.process.alpha(as_time(self.process.t1))) == 0.0

    def forward(self, x: Tensor, t: Tensor, **conditions: Any) -> Tensor:
        if self.blind and t.device.type == "cpu" and bool((self.process.alpha(t) == 0).any()):
            raise ValueError("a prediction of noise says nothing about x_0 at alpha = 0: start short of it")
        return self.clip(self.ask("model", x, t, "x0", conditions))


def from_diffusers(
    net: Callable[..., Any], scheduler_config: Any, *, time: Callable[[Tensor], Tensor] | None = None, clip: bool = True
) -> Model:
    """See `Model.from_diffusers`."""
    if not callable(net):
        raise TypeError(f"expected a network callable as net(x, timestep), got {type(net).__name__}")
    config = read_config(scheduler_config)
    process, prediction, adapter = process_of(config), prediction_of(config), DiffusersNet(net)
    if time is not None and not callable(time):
        raise TypeError(f"expected time as a function of t, got {type(time).__name__}")
    if kind_of(config) == "edm":
        if time is not None:
            raise ValueError("a network in EDM's preconditioning is told log(sigma)/4: expected no other time")
        sign = -1.0 if config["prediction_type"] == "v_prediction" else 1.0
        denoiser = EDMDenoiser(adapter, float(needed(config, "sigma_data")), sign)
        model = Model(denoiser, process, "x0", expand=False)
    else:
        model = Model(adapter, process, prediction, time or told_of(config, process), expand=False)
    threshold = clipping_of(config) if clip else None
    return model if threshold is None else Guided(_Clipped(model, threshold), process, "x0")


def told_of(config: dict[str, Any], process: GaussianSDE) -> TimeInput:
    """What the network is told about a time t: the table's index, or N t of a flow."""
    if kind_of(config) == "flow":
        size = float(needed(config, "num_train_timesteps"))
        return partial(operator.mul, size)
    if config.get("timestep_type", "discrete") != "discrete":
        raise ValueError(
            f'timestep_type={config["timestep_type"]!r} tells the network no index: expected "discrete", or '
            "time=lambda t: -process.lam(t)/4 for its log(sigma)/4"
        )
    return "discrete"
