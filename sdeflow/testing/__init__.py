"""Checks with a verdict per identity, for plain Python and for pytest; Hypothesis strategies in `strategies`.

`check_sde` holds a process and everything derived from it against identities, `check_solver` a method against what it
declares, `check_noise` a source of noise, `check_model` a model. Each returns a `Report`: it prints as a table,
serialises (`to_json`), and raises in a test (`verify`).
"""

from sdeflow.testing.models import check_model
from sdeflow.testing.noise import check_noise
from sdeflow.testing.report import CheckError, Finding, Report
from sdeflow.testing.sde import check_sde
from sdeflow.testing.solvers import check_solver

__all__ = ["CheckError", "Finding", "Report", "check_model", "check_noise", "check_sde", "check_solver"]
