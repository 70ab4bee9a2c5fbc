"""Version, changelog and workflows agree: one place for the version, and steps that anybody can run."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import resnet_fused as rf

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
NUMBER = re.compile(r"\d+\.\d+\.\d+")


def test_the_version_stands_in_one_place():
    assert NUMBER.fullmatch(rf.__version__)
    own = re.compile(rf'version *= *"{re.escape(rf.__version__)}"')
    for name in ("pyproject.toml", "setup.py"):
        assert not own.search((ROOT / name).read_text()), f"{name} repeats the version"
    said = subprocess.run([sys.executable, "setup.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout.splitlines()[-1] == rf.__version__


def test_the_changelog_begins_with_this_version():
    first = re.search(r"^## \[(.*?)\] - (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert first is not None
    assert first.group(1) == rf.__version__
    assert re.fullmatch(r"unreleased|\d{4}-\d\d-\d\d", first.group(2))


def check_tag(folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", "check-tag", f"TAG={tag}"], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make; install it")
def test_a_tag_must_name_the_version_and_the_changelog_the_day(tmp_path):
    for name in ("Makefile", "pyproject.toml", "resnet_fused/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    changelog, tag = tmp_path / "CHANGELOG.md", f"v{rf.__version__}"
    changelog.write_text(f"## [{rf.__version__}] - unreleased\n")
    assert "write the day of the release" in check_tag(tmp_path, tag).stderr
    changelog.write_text(f"## [{rf.__version__}] - 2026-01-31\n")
    assert check_tag(tmp_path, tag).returncode == 0
    wrong = check_tag(tmp_path, "v9.9.9")
    assert wrong.returncode != 0
    assert f"TAG is 'v9.9.9'; __version__ in resnet_fused/__init__.py asks for {tag}" in wrong.stderr


def targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_every_step_of_a_workflow_is_a_make_target(workflow: Path):
    text = workflow.read_text()
    commands = re.findall(r"^ +(?:- )?run: (.*)$", text, re.MULTILINE)
    assert commands
    named = re.findall(r"^ +target: (.*)$", text, re.MULTILINE)
    for command in commands:
        make, target = command.split()[:2]
        assert make == "make"
        for each in named if "matrix.target" in command else [target]:
            assert each in targets(), f"{workflow.name} runs make {each}, which the Makefile doesn't have"
