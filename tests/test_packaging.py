"""The wheel and the source distribution: what they hold, and that the installed package works."""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

import sdeflow as sf

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

TRY = """
import sys, pathlib, torch, sdeflow as sf
assert pathlib.Path(sf.__file__).is_relative_to(sys.argv[1]), sf.__file__
class Well(sf.SDE):
    t0, t1 = 0.0, 1.0
    def drift(self, x, t): return x - x**3
    def diffusion(self, x, t): return 0.5 * torch.ones_like(x)
assert Well().simulate(torch.zeros(3, 2), steps=5, seed=0).x.isfinite().all()
assert sf.sample(sf.load_model("digits"), 2, shape=(1, 8, 8), steps=5).x.shape == (2, 1, 8, 8)
print(sf.__version__)
"""


def run(*command, **how):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=300, **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, source distribution), built from the tree without touching it or the network."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT)
    return next(out.glob("*.whl")), next(out.glob("*.tar.gz"))


def test_the_wheel_holds_the_package_and_nothing_else(built):
    with zipfile.ZipFile(built[0]) as wheel:
        names = set(wheel.namelist())
    here = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "sdeflow").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.endswith(".part")
    }
    assert {"sdeflow/py.typed", "sdeflow/weights/digits.safetensors", "sdeflow/bench/templates/report.html"} <= names
    assert {name for name in names if name.startswith("sdeflow/")} == here
    assert all(re.match(r"sdeflow(/|-[0-9.]+\.dist-info/)", name) for name in names)


def test_the_source_distribution_builds_the_same_wheel(built, tmp_path):
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        archive.extractall(tmp_path, filter="data")
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "tests/test_packaging.py"} <= names
    assert not any(name.startswith((".venv", "results", ".git/", "site/")) for name in names)
    folder = next(tmp_path.iterdir())
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path / "again", folder)
    with zipfile.ZipFile(next((tmp_path / "again").glob("*.whl"))) as one, zipfile.ZipFile(built[0]) as other:
        assert {i.filename: i.CRC for i in one.infolist()} == {i.filename: i.CRC for i in other.infolist()}


@pytest.mark.parametrize("which", [0, pytest.param(1, marks=pytest.mark.slow)], ids=["wheel", "sdist"])
def test_what_is_built_installs_and_runs_in_a_clean_environment(built, tmp_path, which):
    """A new environment that has only this package; torch and the others are lent to it by a path."""
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    lent = next(path for path in sys.path if path.endswith("site-packages"))
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--disable-pip-version-check"]
    (site / "lent.pth").write_text(f"{lent}\n")
    run(*install, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", built[which])
    assert run(python, "-W", "error", "-c", TRY, site, cwd=tmp_path).strip() == sf.__version__
    out = run(tmp_path / "env" / "bin" / "sdeflow", "solvers", "--json", cwd=tmp_path)
    assert '"DPMSolverPP(2)"' in out


def test_the_version_is_one():
    assert sf.__version__ == PROJECT["version"]
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"]
    assert (
        f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
        or "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_the_citation_file_is_whole():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors", "license", "abstract", "type"} <= cited.keys()
    assert cited["license"] == PROJECT["license"]


def test_every_lower_bound_is_stated_and_every_pin_keeps_it():
    """Extras and dependencies have a lower bound, and the constraints hold a version that meets it."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}
    wanted = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name == "sdeflow":
            continue
        assert [s.operator for s in requirement.specifier] == [">="], text
        assert pins[canonicalize_name(requirement.name)] in requirement.specifier, text


def test_the_oldest_versions_are_the_lower_bounds():
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from packaging.version import Version

    lines = [line for line in (ROOT / "constraints-oldest.txt").read_text().splitlines() if not line.startswith("#")]
    oldest = {canonicalize_name(line.split("==")[0]): Version(line.split("==")[1]) for line in lines}
    wanted = [*PROJECT["dependencies"], *(r for extra in PROJECT["optional-dependencies"].values() for r in extra)]
    bounds = {canonicalize_name(Requirement(r).name): next(iter(Requirement(r).specifier), None) for r in wanted}
    assert {"torch", "numpy", "scipy"} <= oldest.keys()
    for name, version in oldest.items():
        assert version == Version(bounds[name].version), name
