"""What a release says in several places agrees: versions, supported Pythons and torch, commands of the workflows."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import sparse_ffn as sf

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
PYTHONS = re.findall(r"Programming Language :: Python :: (3\.\d+)", PROJECT)
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / ".github" / "workflows" / name).read_text())


def steps(workflow: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for job in workflow["jobs"].values():
        yield job  # which may itself use a workflow
        yield from job.get("steps", [])


def test_changelog_and_citation_are_of_the_packages_version() -> None:
    headings = re.findall(r"^## \[(.+)\](?: - (.+))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [heading for heading in headings if heading[0] != "Unreleased"]
    assert released[0][0] == sf.__version__
    assert all(re.fullmatch(r"20\d\d-\d\d-\d\d", date) for _, date in released)
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == sf.__version__


def test_the_suite_runs_on_the_ends_of_what_is_supported() -> None:
    runs = read("tests.yml")["jobs"]["suite"]["strategy"]["matrix"]["include"]
    tested = [run["python"] for run in runs]
    assert set(tested) <= set(PYTHONS)
    assert (tested[0], tested[-1]) == (PYTHONS[0], PYTHONS[-1])
    oldest = re.findall(r'"torch>=(.+)"', PROJECT)
    assert [f"{version}.*" for version in oldest] == [run["torch"] for run in runs if "torch" in run]


def test_wheels_are_tried_on_the_ends_of_what_is_supported() -> None:
    (built,) = re.findall(r"^\[tool\.cibuildwheel\].*\nbuild = \[(.*?)\]", PROJECT, re.M)
    ends = [python.replace(".", "") for python in (PYTHONS[0], PYTHONS[-1])]
    assert re.findall(r"cp(\d+)-", built) == ends
    assert f'requires-python = ">={PYTHONS[0]}"' in PROJECT


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_a_workflow_pins_its_actions_and_may_read_only(path: Path) -> None:
    workflow = read(path.name)
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert all(use.startswith("./") or re.search(r"@(release/)?v\d", use) for use in used), used
    assert set(workflow["permissions"].items()) <= {("contents", "read")}
    granted = [job["permissions"] for job in workflow["jobs"].values() if "permissions" in job]
    writing = [what for permissions in granted for what, level in permissions.items() if level == "write"]
    assert writing == (["id-token"] if path.stem == "release" else [])  # PyPI's trusted publishing


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("target", ["test", "demo"])
def test_make_installs_anew_what_has_changed_in_the_core(target: str, tmp_path: Path) -> None:
    for stamp in ("DEMO", "DEV"):
        (tmp_path / stamp).touch()
    command = ("make", "-C", ROOT, "--dry-run", target, *(f"{stamp}={tmp_path / stamp}" for stamp in ("DEMO", "DEV")))
    for changed, installs in (((), False), (("-W", "csrc/cpu/bag.cpp"), True)):
        result = subprocess.run([*command, *changed], capture_output=True, text=True, check=True)
        assert ("pip install" in result.stdout) == installs


def test_ci_makes_what_the_makefile_has() -> None:
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    commands = [step.get("run", "") for path in WORKFLOWS for step in steps(read(path.name))]
    matrix = read("checks.yml")["jobs"]["check"]["strategy"]["matrix"]["target"]
    made = {word for command in commands for line in re.findall(r"^make (.*)$", command, re.M) for word in line.split()}
    made = {word for word in made if re.fullmatch(r"\w+", word)} | set(matrix)
    assert {"test", "exhaustive", "lint", "docs"} <= made <= set(phony.split())
