"""Expectations of functionals of samples and paths, with confidence intervals, by the cheapest of several methods."""

from sdeflow.expectation.estimate import Candidate, Expectation, Level
from sdeflow.expectation.run import expect

__all__ = ["Candidate", "Expectation", "Level", "expect"]
