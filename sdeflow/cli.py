"""The command line: `app` is the entry point `sdeflow`, each command a function registered on it."""

from __future__ import annotations

import dataclasses
from importlib.metadata import version
from typing import Annotated, Any

try:
    import tqdm  # noqa: F401  # asked for here, not after minutes of work
    import typer
    from typer.core import TyperGroup
except ImportError as error:
    raise SystemExit(f'the command line needs its extra: pip install "sdeflow[cli]" ({error})') from error

from sdeflow.bench.cli import bench_command, report_command
from sdeflow.cli_options import AsJson
from sdeflow.cli_outcome import ARGUMENTS, say_json, usage_in_one_line
from sdeflow.sample_cli import sample_command
from sdeflow.testing.cli import check_command
from sdeflow.train_cli import train_command
from sdeflow.tuning.cli import tune_command


class _Group(TyperGroup):
    """Keeps the words of the command line, to say how to go on after a break, and what is wrong with them in a line."""

    def make_context(self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any) -> Any:
        given = list(args)
        with usage_in_one_line():
            context = super().make_context(info_name, args, parent=parent, **extra)
        context.meta[ARGUMENTS] = given
        return context

    def invoke(self, ctx: Any) -> Any:
        with usage_in_one_line(ctx):
            return super().invoke(ctx)


app = typer.Typer(cls=_Group, no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"sdeflow {version('sdeflow')}")
        raise typer.Exit


@app.callback()
def main(
    show: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """SDE and ODE solvers with a diffusion front end."""


@app.command("solvers", epilog="Example: sdeflow solvers --json")
def solvers_command(as_json: AsJson = False) -> None:
    """List the solvers: orders, model calls a step, and where they come from."""
    from sdeflow.solvers import CATALOGUE

    if as_json:
        columns = [field.name for field in dataclasses.fields(CATALOGUE[0]) if field.name != "make"]
        say_json([{name: getattr(row, name) for name in columns} for row in CATALOGUE])
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("solver", no_wrap=True)
    for name in ("order", "strong", "weak", "NFE/step", "view", "reference"):
        table.add_column(name)
    for row in CATALOGUE:
        numbers = ("" if value is None else str(value) for value in (row.order, row.strong_order, row.weak_order))
        kind = f"{row.view}, adaptive" if row.adaptive else row.view
        table.add_row(row.name, *numbers, str(row.nfe_per_step), kind, row.reference)
    Console().print(table)


app.command("bench", epilog="Example: sdeflow bench --suite quick --out results/quick")(bench_command)
app.command("check", epilog="Example: sdeflow check my_process.py:DoubleWell --emit-tests tests/test_my_process.py")(
    check_command
)
app.command("report", epilog="Example: sdeflow report a/results.jsonl b/results.jsonl --out compared.html")(
    report_command
)
app.command("sample", epilog="Example: sdeflow sample digits --num 100 --steps 10 --out results/samples")(
    sample_command
)
app.command("train", epilog="Example: sdeflow train digits --out runs/digits")(train_command)
app.command("tune", epilog="Example: sdeflow tune digits --steps 10 --out results/digits-10.json")(tune_command)
