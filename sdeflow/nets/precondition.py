"""The preconditioning of EDM around any network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sdeflow.checked import LARGEST, checked_class
from sdeflow.nets.mlp import MLP
from sdeflow.nets.unet import UNet

_INNER: dict[str, type[MLP] | type[UNet]] = {"MLP": MLP, "UNet": UNet}


@checked_class
class EDMPreconditioned(nn.Module):
    """D(x, sigma) = c_skip x + c_out F(c_in x, -log sigma), a data prediction under EDM or VE (`time="sigma"`).

        c_skip = sigma_d^2/(sigma^2 + sigma_d^2),  c_out = sigma sigma_d/sqrt(sigma^2 + sigma_d^2),
        c_in = 1/sqrt(sigma^2 + sigma_d^2)         (Karras et al. 2022, EDM, equation 7 and table 1)

    F reads lam = -log sigma in place of the paper's log(sigma)/4, as this package's networks do.

    Args:
        net: the network F, called as `net(x, lam)`; or its description, {"name": "MLP", ...its config}.
        sigma_data: the standard deviation of the data.
    """

    def __init__(self, net: nn.Module | dict[str, Any], sigma_data: float = 0.5) -> None:
        super().__init__()
        if isinstance(net, dict):
            name = net.get("name")
            if name not in _INNER:
                raise ValueError(f"expected the description of one of {', '.join(_INNER)}, got {name!r}")
            net = _INNER[name](**{key: value for key, value in net.items() if key != "name"})
        if not 0 < sigma_data <= LARGEST:
            raise ValueError(f"expected sigma_data > 0, got {sigma_data!r} (at most {LARGEST:g})")
        self.net, self.sigma_data = net, float(sigma_data)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one sample."""
        inner: Any = self.net
        return inner.shape

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        inner: Any = self.net
        return {"net": {"name": type(inner).__name__, **inner.config}, "sigma_data": self.sigma_data}

    def forward(self, x: Tensor, sigma: Tensor, label: Tensor | None = None) -> Tensor:
        """The posterior mean (batch, *shape) at x and sigma (batch,)."""
        s = sigma.reshape(-1, *[1] * (x.ndim - 1))
        total = s**2 + self.sigma_data**2
        inner = x / torch.sqrt(total)
        lam = -torch.log(sigma)
        out = self.net(inner, lam) if label is None else self.net(inner, lam, label=label)
        return self.sigma_data**2 / total * x + s * self.sigma_data / torch.sqrt(total) * out
