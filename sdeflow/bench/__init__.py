"""The benchmark: error against model calls, on exact problems and on your own network.

    results = sf.bench.run("quick", out="results/quick")
    results = sf.bench.run(sf.bench.Problem(model, shape=(3, 32, 32)), nfe=[5, 10, 20])
    sf.bench.report(["a/results.jsonl", "b/results.jsonl"], "comparison.html")

Running needs torch alone; files and reports need the extra: pip install 'sdeflow[bench]'.
"""

from sdeflow.bench.methods import GRIDS, METHODS, Method
from sdeflow.bench.page import report
from sdeflow.bench.problem import Problem, load
from sdeflow.bench.results import Result, read, write
from sdeflow.bench.runner import run
from sdeflow.bench.suites import SUITES, Suite

__all__ = [
    "GRIDS",
    "METHODS",
    "SUITES",
    "Method",
    "Problem",
    "Result",
    "Suite",
    "load",
    "read",
    "report",
    "run",
    "write",
]
