"""diffrax: compiled by XLA, on one thread; the time to compile is left out."""

from __future__ import annotations

import math
import os
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers.problem import Run, Sample, Sampling
from benchmarks.sde import MU, NU

NOTE = "compiled, 1 thread"


def _jax() -> Any:
    """jax on one thread, with float64."""
    os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    import jax

    jax.config.update("jax_enable_x64", True)
    return jax


def _mixture(dtype: Any, components: int = 8) -> Any:
    """`benchmarks.overhead.mixture` in jax."""
    import jax.numpy as jnp
    from jax.nn import softmax

    angle = np.arange(components) * 2 * math.pi / components
    centres = jnp.asarray(4 * np.stack([np.cos(angle), np.sin(angle)]), dtype)
    half = 0.5 * jnp.square(centres).sum(0)

    def eps(x: Any, sigma: Any) -> Any:
        alpha = jnp.sqrt(1 - sigma * sigma)
        variance = 0.04 * alpha * alpha + sigma * sigma
        logits = (x @ (centres * alpha) - half * alpha * alpha) / variance
        mean = softmax(logits, -1) @ (centres * alpha).T
        return (x - mean) * (sigma / variance)

    return eps


def steppers(p: Sampling) -> dict[str, Run]:
    """Equal steps of the autonomous ODE."""
    jax = _jax()
    import diffrax as dx
    import jax.numpy as jnp

    eps, sigma = _mixture(jnp.float32), np.float32(0.5)
    x = jnp.asarray(p.x.numpy())
    methods = {"Euler": (dx.Euler(), 1), "midpoint": (dx.Midpoint(), 2), "Heun": (dx.Heun(), 2)}
    found = {}
    for name, (solver, calls) in methods.items():

        def solve(y: Any, solver: Any = solver) -> Any:
            term = dx.ODETerm(lambda t, y, args: eps(y, sigma))
            end = dx.diffeqsolve(term, solver, 0.0, 1.0, np.float32(1 / p.steps), y, adjoint=dx.DirectAdjoint(),
                                 max_steps=p.steps + 1)  # fmt: skip
            return end.ys[-1]

        compiled = jax.jit(solve)
        found[name] = Run(partial(_waited, compiled, x), calls * p.steps, NOTE)
    return found


def precise(p: Sampling) -> dict[str, Sample]:
    """The flow as dz/d rho = eps with z = x/alpha, float64."""
    jax = _jax()
    import diffrax as dx
    import jax.numpy as jnp

    eps = _mixture(jnp.float64)

    def f(rho: Any, z: Any, args: Any) -> Any:
        alpha = 1 / jnp.sqrt(1 + rho * rho)
        return eps(z * alpha, rho * alpha)

    x, found = jnp.asarray(p.x.double().numpy()), {}
    methods = {"Euler": (dx.Euler(), 1, 0), "midpoint": (dx.Midpoint(), 2, 0), "Heun": (dx.Heun(), 2, 0),
               "Ralston": (dx.Ralston(), 2, 0), "Bosh3": (dx.Bosh3(), 3, 1)}  # fmt: skip
    for grid in ("logsnr", "karras"):
        for name, (solver, calls, once) in methods.items():
            steps = (p.steps - once) // calls
            if steps < 1:
                continue
            rho = jnp.asarray(Sampling(p.net, p.x, steps).rhos(grid).numpy())

            def solve(y: Any, solver: Any = solver, rho: Any = rho) -> Any:
                z = y * jnp.sqrt(1 + rho[0] ** 2)
                end = dx.diffeqsolve(
                    dx.ODETerm(f), solver, rho[0], rho[-1], None, z, stepsize_controller=dx.StepTo(ts=rho)
                )
                return end.ys[-1] / jnp.sqrt(1 + rho[-1] ** 2)

            run = jax.jit(solve)
            found[f"{name} {grid}"] = Sample(partial(_as_tensor, run, x), calls * steps + once)
    return found


def sdes(x: Tensor, steps: int) -> dict[str, Run]:
    """Geometric Brownian motion on a path that is drawn step by step; Milstein as a scalar equation a component."""
    jax = _jax()
    import diffrax as dx
    import jax.numpy as jnp
    import lineax as lx

    start, found = jnp.asarray(x.numpy()), {}
    kinds = {
        "Euler-Maruyama": (dx.Euler(), dx.BrownianIncrement, MU, False, NOTE),
        "Milstein": (dx.ItoMilstein(), dx.BrownianIncrement, MU, True, NOTE),
        "SRK, order 1.5": (dx.SPaRK(), dx.SpaceTimeLevyArea, MU - 0.5 * NU**2, False, f"{NOTE}; SPaRK, Stratonovich"),
    }
    for name, (solver, area, rate, scalar, note) in kinds.items():

        def one(
            y: Any, key: Any, solver: Any = solver, area: Any = area, rate: float = rate, scalar: bool = scalar
        ) -> Any:
            path = dx.UnsafeBrownianPath(shape=jax.ShapeDtypeStruct(y.shape, jnp.float32), key=key, levy_area=area)

            def diffusion(t: Any, y: Any, args: Any) -> Any:
                return NU * y if scalar else lx.DiagonalLinearOperator(NU * y)

            terms = dx.MultiTerm(dx.ODETerm(lambda t, y, args: rate * y), dx.ControlTerm(diffusion, path))
            end = dx.diffeqsolve(
                terms, solver, 0.0, 1.0, np.float32(1 / steps), y, adjoint=dx.DirectAdjoint(), max_steps=steps + 1
            )
            return end.ys[-1]

        def every(y: Any, key: Any, one: Any = one, scalar: bool = scalar) -> Any:
            if not scalar:
                return one(y, key)
            return jax.vmap(one)(y.ravel(), jax.random.split(key, y.size))

        compiled, key = jax.jit(every), jax.random.key(0)

        def run(compiled: Any = compiled, key: Any = key) -> Any:
            with jax.enable_x64(False):
                return compiled(start, key).block_until_ready()

        found[name] = Run(run, steps, note)
    return found


def _waited(run: Any, x: Any) -> Any:
    """The result, once it is there."""
    return run(x).block_until_ready()


def _as_tensor(run: Any, x: Any) -> torch.Tensor:
    return torch.from_numpy(np.array(run(x)))
