"""What a battery of checks found: one verdict an identity, with the point where it is worst."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

Verdict = Literal["pass", "fail", "not tested"]


@dataclass(frozen=True)
class Finding:
    """The verdict on one identity.

    Attributes:
        identity: its name.
        formula: what should be zero, or hold.
        residual: the largest relative violation found; NaN where it was not tested.
        tolerance: the largest residual that passes.
        verdict: "pass", "fail" or "not tested".
        where: the point of the largest residual, as {"x": [...], "t": ...} or whatever was varied; {} for none.
        note: why it was not tested, or what a failure of this kind usually means.
    """

    identity: str
    formula: str
    residual: float
    tolerance: float
    verdict: Verdict
    where: dict[str, Any] = field(default_factory=dict)
    note: str = ""

    @staticmethod
    def of(
        identity: str,
        formula: str,
        residual: float,
        tolerance: float,
        where: dict[str, Any] | None = None,
        note: str = "",
    ) -> Finding:
        """The verdict that a residual gives; one that is not a number fails."""
        good = math.isfinite(residual) and residual <= tolerance
        return Finding(
            identity, formula, float(residual), float(tolerance), "pass" if good else "fail", where or {}, note
        )

    @staticmethod
    def skipped(identity: str, formula: str, why: str) -> Finding:
        """An identity that could not be tested."""
        return Finding(identity, formula, math.nan, math.nan, "not tested", {}, why)


class CheckError(AssertionError):
    """A check failed. `report` is the whole report."""

    def __init__(self, report: Report) -> None:
        self.report = report
        super().__init__(report.failures())


@dataclass(frozen=True)
class Report:
    """The findings of a battery of checks.

    Attributes:
        subject: what was checked.
        findings: one an identity.
        facts: what was found out about the subject, in words, in the order to print them.
        warnings: pitfalls that are not errors, each "name: what and why".
    """

    subject: str
    findings: tuple[Finding, ...]
    facts: dict[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no identity failed, and at least one was tested."""
        verdicts = [f.verdict for f in self.findings]
        return "fail" not in verdicts and "pass" in verdicts

    def __getitem__(self, identity: str) -> Finding:
        """The finding on the identity of that name."""
        for finding in self.findings:
            if finding.identity == identity:
                return finding
        raise KeyError(f"no identity {identity!r}; there are {', '.join(f.identity for f in self.findings)}")

    def verify(self) -> Report:
        """This report, if it is ok.

        Raises:
            CheckError: an identity failed, or none could be tested.
        """
        if not self.ok:
            raise CheckError(self)
        return self

    def failures(self) -> str:
        """The failed identities, one a line, for an error message."""
        failed = [f for f in self.findings if f.verdict == "fail"]
        lines = [
            f"  {f.identity}: {f.formula}: residual {f.residual:.2e} > {f.tolerance:.1e}"
            + (f" at {_place(f.where)}" if f.where else "")
            + (f" ({f.note})" if f.note else "")
            for f in failed
        ]
        if not lines:
            return f"{self.subject}: no identity could be tested"
        return "\n".join([f"{self.subject}: {len(failed)} of {len(self.findings)} identities fail", *lines])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain numbers, strings, lists and dictionaries."""
        return {
            "subject": self.subject,
            "ok": self.ok,
            "facts": self.facts,
            "warnings": list(self.warnings),
            "findings": [_plain(asdict(f)) for f in self.findings],
        }

    def to_json(self) -> str:
        """The report as JSON; residuals that are not numbers are null."""
        return json.dumps(self.to_dict(), indent=1)

    def print(self, console: Console | None = None) -> None:
        """Print the facts, the table and the warnings."""
        console = console or Console()
        console.print(f"[bold]{escape(self.subject)}[/bold]", highlight=False)
        for name, words in self.facts.items():
            console.print(f"  {name}: {words}", highlight=False, markup=False)
        console.print(self._table(formulas=console.width >= _WIDE))
        for f in self.findings:
            if f.verdict != "pass":
                console.print(f"{_MARKS[f.verdict]} {escape(f.identity)}: {escape(_remark(f))}", highlight=False)
        for warning in self.warnings:
            console.print(f"[yellow]warning[/yellow] {escape(warning)}", highlight=False)

    def _table(self, formulas: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("identity", no_wrap=True)
        if formulas:
            table.add_column("formula")
        for name in ("residual", "tolerance"):
            table.add_column(name, justify="right")
        table.add_column("verdict")
        for f in self.findings:
            tested = f.verdict != "not tested"
            table.add_row(
                escape(f.identity),
                *([escape(f.formula)] if formulas else []),
                f"{f.residual:.1e}" if tested else "",
                f"{f.tolerance:.1e}" if tested else "",
                _MARKS[f.verdict],
            )
        return table

    def __str__(self) -> str:
        console = Console(width=140, no_color=True)
        with console.capture() as captured:
            self.print(console)
        return captured.get()


_WIDE = 110
"""Columns of a terminal from which the formulas are shown beside the verdicts."""
_MARKS = {"pass": "[green]pass[/green]", "fail": "[red]fail[/red]", "not tested": "[dim]not tested[/dim]"}


def _remark(f: Finding) -> str:
    if f.verdict == "not tested":
        return f.note
    parts = [f.formula, f"residual {f.residual:.1e} at {_place(f.where)}" if f.where else "", f.note]
    return "; ".join(part for part in parts if part)


def merged(subject: str, reports: Iterable[Report]) -> Report:
    """Several reports as one."""
    reports = list(reports)
    return Report(
        subject,
        tuple(f for r in reports for f in r.findings),
        {k: v for r in reports for k, v in r.facts.items()},
        tuple(w for r in reports for w in r.warnings),
    )


def _place(where: dict[str, Any]) -> str:
    return ", ".join(f"{name} = {_shown(value)}" for name, value in where.items())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_shown(v) for v in value) + "]"
    return str(value)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
