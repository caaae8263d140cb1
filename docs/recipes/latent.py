"""Latent diffusion (Rombach et al. 2022, High-resolution image synthesis with latent diffusion models) on the digits.

As in the paper: an autoencoder first, then a diffusion of its codes with the autoencoder fixed, then the decoder. The
codes are shifted and scaled to mean 0 and variance 1 a channel, by statistics that are kept with the autoencoder, so
that encoder, diffusion and decoder speak of the same codes. Shrunk: 64 pixels to 16 numbers by two small MLPs, no
adversarial loss; a little noise on the codes stands for the KL term; v prediction under VP.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import judge
import report
import safetensors.torch
import torch
from torch import Tensor, nn

import sdeflow as sf
from sdeflow import training
from sdeflow.data import digits

CODE = 16


class Autoencoder(nn.Module):
    """Images (n, 1, 8, 8) to codes (n, 16) of mean 0 and variance 1, and back."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.SiLU(), nn.Linear(width, CODE))
        self.up = nn.Sequential(nn.Linear(CODE, width), nn.SiLU(), nn.Linear(width, 64), nn.Unflatten(1, (1, 8, 8)))
        self.register_buffer("shift", torch.zeros(CODE))
        self.register_buffer("scale", torch.ones(CODE))

    def encode(self, x: Tensor) -> Tensor:
        """The normalised codes."""
        return (self.down(x) - self.shift) / self.scale

    def decode(self, z: Tensor) -> Tensor:
        """The images of normalised codes."""
        return self.up(z * self.scale + self.shift)

    @torch.no_grad()
    def normalise(self, x: Tensor) -> None:
        """Keep the statistics of the codes of x."""
        std, mean = torch.std_mean(self.down(x), dim=0)
        self.shift, self.scale = mean, std


@dataclass(frozen=True)
class Latent:
    """What is needed to sample: the diffusion of the codes and the autoencoder."""

    model: sf.Model
    autoencoder: Autoencoder

    def save(self, path: Path) -> None:
        """Write both, the autoencoder next to the diffusion."""
        sf.save_model(path, self.model)
        safetensors.torch.save_file(self.autoencoder.state_dict(), path.with_suffix(".autoencoder.safetensors"))


def load(path: Path) -> Latent:
    """What `Latent.save` wrote."""
    autoencoder = Autoencoder()
    autoencoder.load_state_dict(safetensors.torch.load_file(path.with_suffix(".autoencoder.safetensors")))
    return Latent(sf.load_model(path), autoencoder.eval().requires_grad_(False))


def train_autoencoder(images: Tensor, steps: int, seed: int) -> Autoencoder:
    """Mean squared error with a tenth of a deviation of noise on the codes."""
    torch.manual_seed(seed)
    autoencoder = Autoencoder()
    optimiser = torch.optim.AdamW(autoencoder.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        x = images[torch.randint(len(images), (256,))]
        code = autoencoder.down(x)
        noisy = code + 0.1 * code.detach().std(0) * torch.randn_like(code)
        loss = (autoencoder.up(noisy) - x).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    autoencoder.normalise(images)
    return autoencoder.eval().requires_grad_(False)


def train(steps: int = 4000, seed: int = 0) -> Latent:
    """The autoencoder, for half as many steps, then the diffusion of its codes."""
    images = digits()[0]
    autoencoder = train_autoencoder(images, max(1, steps // 2), seed)
    start = training.untrained((CODE,), seed=seed)
    return Latent(training.train(start, autoencoder.encode(images), steps=steps, seed=seed)[0], autoencoder)


def samples(latent: Latent, num: int, seed: int = 0) -> report.Samples:
    """Decoded images; beside them real digits through the autoencoder alone: about the best a diffusion can do."""
    run = partial(sf.sample, latent.model, num, shape=(CODE,), seed=seed)
    images = report.Samples(
        {
            "DDIM, 50 steps": run(solver=sf.solvers.DDIM(), steps=50),
            "DPM-Solver++(2M), 20 steps": run(solver=sf.solvers.DPMSolverPP(order=2), steps=20),
        },
        decode=latent.autoencoder.decode,
    )
    real = judge.halves()[2][:num]
    images["autoencoder alone"] = latent.autoencoder.decode(latent.autoencoder.encode(real))
    images.nfe["autoencoder alone"] = 0.0
    return images


if __name__ == "__main__":
    trained = train()
    real = judge.halves()[2]
    again = trained.autoencoder.decode(trained.autoencoder.encode(real))
    print(f"pixel error of the autoencoder, root mean square {float((again - real).square().mean().sqrt()):.3f}")
    report.show(samples(trained, judge.SIZE))
