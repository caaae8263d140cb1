"""Checks with a verdict per identity, for plain Python and for pytest."""

from sdeflow.testing.report import CheckError, Finding, Report

__all__ = ["CheckError", "Finding", "Report"]
