"""The solvers of torchdiffeq, torchsde and scipy behind the library's own call, with its checks, counts and statuses.

To a tolerance all of them step the whole batch with one step size, steered by an error norm over the batch: unlike
under `RK45`, a sample's error depends on its batch, and one that fails ends the solve of all. The problem is called
with states of the caller's dtype and float64 times, and never outside the span; the arithmetic of the ODE solvers is
in float64 whatever the state's dtype.
"""

from sdeflow.solvers.backends.shared import Backend, March
from sdeflow.solvers.backends.with_scipy import Scipy
from sdeflow.solvers.backends.with_torchdiffeq import Torchdiffeq
from sdeflow.solvers.backends.with_torchsde import Torchsde

__all__ = ["Backend", "March", "Scipy", "Torchdiffeq", "Torchsde"]
