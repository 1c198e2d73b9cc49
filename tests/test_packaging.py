"""One shipped package, and no second way to import it."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def test_every_package_folder_is_shipped():
    with (ROOT / "pyproject.toml").open("rb") as stream:
        mapped = tomllib.load(stream)["tool"]["setuptools"]["package-dir"]
    outside = {"build", "dist", "tests", ".venv"}
    folders = {
        str(init.parent.relative_to(ROOT))
        for init in ROOT.glob("**/__init__.py")
        if not outside & set(init.relative_to(ROOT).parts)
    }
    assert set(mapped.values()) == folders


@pytest.mark.parametrize("name", ["placement", "profiles", "runtime", "cli"])
def test_bare_names_are_refused(name):
    result = subprocess.run(
        [sys.executable, "-c", f"import {name}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert f"import eplb.{name}; the bare name" in result.stderr


def test_subpackages_are_found_from_the_checkout():
    result = subprocess.run(
        [sys.executable, "-S", "-c", "import eplb; print(eplb.__path__)"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert str(ROOT) in result.stdout


def test_the_wheel_has_one_top_level(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    code = (
        "import setuptools.build_meta as b, sys; "
        "print(b.build_wheel(sys.argv[1], {'--build-option': []}))"
    )
    copy = tmp_path / "copy"
    copy.mkdir()
    tracked = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for name in tracked.stdout.splitlines():
        if (ROOT / name).is_file():
            target = copy / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=copy, capture_output=True, check=True
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"eplb"}
    for shipped in (
        "eplb/py.typed",
        "eplb/profiles/data/sample.npz",
        "eplb/cli/main.py",
        "eplb/cli/report/static/echarts.min.js",
        "eplb/cli/report/static/echarts.LICENSE",
        "eplb/cli/report/templates/page.html.j2",
    ):
        assert shipped in names
