"""Bad input by the thousand: `python -m benchmarks.fuzz [N] [--seed S] [--only TEXT] [--show]`.

Every public constructor and function is called with one argument replaced by what does not belong there, files are
read that were damaged on purpose, and the command line is called with nonsense. The table counts what came of it;
the exit status is 1 if anything forbidden did: a hang, a crash, an unexplained error, a silent wrong result, a part
of a file.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Sequence

import torch

from benchmarks.fuzzing import commands, files
from benchmarks.fuzzing.cases import Case, all_of
from benchmarks.fuzzing.outcome import VERDICTS, Outcome
from benchmarks.fuzzing.pools import Skip
from benchmarks.fuzzing.targets_constructors import TARGETS as CONSTRUCTORS
from benchmarks.fuzzing.targets_parts import TARGETS as PARTS
from benchmarks.fuzzing.targets_runs import TARGETS as RUNS
from benchmarks.fuzzing.targets_solvers import OF_CATALOGUE
from benchmarks.fuzzing.targets_solvers import TARGETS as SOLVERS
from benchmarks.fuzzing.targets_solving import TARGETS as SOLVING

MEMORY = 12 * 2**30
"""Bytes of address space: what asks for more fails here instead of filling the machine."""

KINDS = {
    "constructors": CONSTRUCTORS,
    "solvers": SOLVERS,
    "every solver of the catalogue": OF_CATALOGUE,
    "solving, grids, likelihood": SOLVING,
    "losses, metrics, guidance, checks": PARTS,
    "runs, statistics, bridges": RUNS,
    "files": (),
    "the command line": (),
}


def cases(kind: str) -> list[Case]:
    """The inputs of a kind."""
    apart = {"files": files.cases, "the command line": commands.cases}
    return apart[kind]() if kind in apart else [case for target in KINDS[kind] for case in all_of(target)]


def chosen(number: int | None, seed: int) -> dict[str, list[Case]]:
    """About `number` of the inputs, at random but the same for a seed; None is all."""
    everything = {kind: cases(kind) for kind in KINDS}
    total = sum(map(len, everything.values()))
    if number is None or number >= total:
        return everything
    draw = random.Random(seed)
    return {
        kind: [given[i] for i in sorted(draw.sample(range(len(given)), -(-number * len(given) // total)))]
        for kind, given in everything.items()
    }


def tried(given: Sequence[Case]) -> list[tuple[Case, Outcome]]:
    """The outcomes of those inputs that apply."""
    found = []
    for case in given:
        faulthandler.dump_traceback_later(150, exit=True)  # a hang that no signal ends
        try:
            found.append((case, case.attempt()))
        except Skip:
            pass
        finally:
            faulthandler.cancel_dump_traceback_later()
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the inputs and print the table of outcomes."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("number", nargs="?", type=int, help="inputs to try; all unless given")
    parser.add_argument("--seed", type=int, default=0, help="of the choice")
    parser.add_argument("--only", default="", help="inputs whose name contains this text")
    parser.add_argument("--show", action="store_true", help="print every outcome")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    faulthandler.enable()
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    began, total, forbidden = time.monotonic(), Counter[str](), 0
    print(f"{'':34s}" + "".join(f"{verdict:>20s}" for verdict in VERDICTS) + f"{'inputs':>10s}")
    for kind, given in chosen(options.number, options.seed).items():
        # the drawing of a report reserves more address space than that
        limit = most if kind == "the command line" else MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, most))
        outcomes = tried([case for case in given if options.only in str(case)])
        counts = Counter(outcome.verdict for _, outcome in outcomes)
        print(f"{kind:34s}" + "".join(f"{counts[v]:>20d}" for v in VERDICTS) + f"{len(outcomes):>10d}", flush=True)
        for case, outcome in outcomes:
            if outcome.verdict == "FORBIDDEN" or options.show:
                print(f"  {outcome.verdict}: {case}: {outcome.reason}", flush=True)
        total += Counter({str(verdict): count for verdict, count in counts.items()})
        forbidden += counts["FORBIDDEN"]
    print(f"{'together':34s}" + "".join(f"{total[v]:>20d}" for v in VERDICTS) + f"{sum(total.values()):>10d}")
    print(f"{time.monotonic() - began:.0f} seconds")
    return 1 if forbidden else 0


if __name__ == "__main__":
    sys.exit(main())
