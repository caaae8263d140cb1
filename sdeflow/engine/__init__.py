"""Where independent pieces of work are computed: in this process, in a pool of processes, or on a Ray cluster.

A sample's noise belongs to its index, so that a piece of work, a range of indices, can be computed anywhere, lost, and
computed again with the same result. `Engine.map` is all that `sample_to`, `ensemble`, `bench.run` and `tune` ask for.
"""

from sdeflow.engine.base import Engine, EngineError
from sdeflow.engine.local import Local
from sdeflow.engine.on_ray import Ray

__all__ = ["Engine", "EngineError", "Local", "Ray", "named"]

ENGINES = ("local", "ray")


def named(name: str, *, address: str | None = None, workers: int | None = None) -> Engine:
    """The engine of a command line: "local" or "ray".

    Args:
        name: of the engine.
        address: of a running Ray cluster, "auto" for the one this machine belongs to; None starts one here.
        workers: processes; one for "local" and one a core for "ray" unless given.

    Raises:
        ValueError: another name, or an address without Ray.
        ImportError: Ray is not installed.
    """
    if name not in ENGINES:
        raise ValueError(f"unknown engine {name!r}: expected one of {', '.join(ENGINES)}")
    if name == "ray":
        return Ray(address, workers=workers)
    if address is not None:
        raise ValueError(f"an address belongs to --engine ray, got {address!r} with {name!r}")
    return Local(1 if workers is None else workers)
