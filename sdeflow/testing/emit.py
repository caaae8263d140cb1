"""A pytest file for a user's project that checks their SDE."""

from __future__ import annotations

import os
from pathlib import Path

from sdeflow.sde import SDE

_TEMPLATE = '''"""Checks of {name}, written by `sdeflow check {target} --emit-tests {file}`. Edit it as you like."""

{imports}

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from sdeflow.testing import check_sde
from sdeflow.testing.cli import as_sde
{find}

REPORT = check_sde(SDE)


@pytest.mark.parametrize("identity", [f.identity for f in REPORT.findings if f.verdict != "not tested"])
def test_identity(identity):
    """One test an identity of `sdeflow check`."""
    finding = REPORT[identity]
    assert finding.verdict == "pass", f"{{finding.formula}}: residual {{finding.residual:.1e}} at {{finding.where}}"


@settings(max_examples=5, deadline=None, derandomize=True, phases=[Phase.generate])  # a smaller seed tells no more
@given(seed=st.integers(0, 2**16))
def test_at_other_points(seed):
    """The same at other points, with another trial density."""
    check_sde(SDE, points=8, seed=seed).verify()
'''


def emitted(target: str, sde: SDE, file: Path) -> str:
    """The text of the test file for the SDE named by `target`, to be written to `file`."""
    source, _, name = target.rpartition(":")
    if source.endswith(".py") or "/" in source:
        relative = Path(os.path.relpath(Path(source).resolve(), file.resolve().parent)).as_posix()
        imports = "from pathlib import Path"
        find = (
            "from sdeflow.user_code import executed\n\n"
            f'HERE = Path(__file__).parent\nSDE = as_sde(executed(HERE / "{relative}").{name}, "{name}")'
        )
    else:
        imports = f"import {source}"
        find = f'\nSDE = as_sde({source}.{name}, "{name}")'
    return _TEMPLATE.format(name=type(sde).__name__, target=target, file=file.name, imports=imports, find=find)
