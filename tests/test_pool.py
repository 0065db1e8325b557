"""The pool of processes that tests a card: who runs what, and what becomes of tests that end their process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.card import pool
from benchmarks.card.pool_worker import verdicts, write

ROOT = Path(__file__).parents[1]
TESTS = """
import atexit, os, pathlib, time
import pytest

def once(name):
    try:
        pathlib.Path(__file__).with_name(name).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True

@pytest.mark.parametrize("n", range(8))
def test_passes(n):
    assert once(f"ran-{n}"), "it was run twice"

def test_fails():
    assert 1 == 2, "a reason"

def test_is_skipped():
    pytest.skip("it needs two cards")

def test_ends_its_process():
    os._exit(9)

def test_after_which_its_process_cannot_end_well():
    atexit.register(os._exit, 134)

def test_leaves_a_useless_context():
    raise RuntimeError("CUDA error: an illegal memory access was encountered")

def test_needs_the_card_alone():
    if once("memory"):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20 GiB")
"""


def arguments(folder: Path, tests: str) -> list[str]:
    """pytest's, for a file of tests: no plugin of this environment takes part."""
    (folder / "gpu").mkdir()
    (folder / "gpu" / "test_them.py").write_text(tests)
    (folder / "test_others.py").write_text("def test_that_needs_no_card(): pass")
    (folder / "pytest.ini").write_text("[pytest]\n")
    absent = ("cacheprovider", "xdist", "timeout", "hypothesispytest", "Sybil")
    return ["-q", *(part for name in absent for part in ("-p", f"no:{name}")), str(folder)]


def outcomes(folder: Path) -> dict[str, str]:
    return {test.rpartition("::")[2]: verdict["outcome"] for test, verdict in verdicts(folder).items()}


@pytest.mark.exhaustive
def test_every_test_is_run_once_and_one_that_ends_its_process_has_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = tmp_path / "found"
    assert pool.main(["--folder", str(found), "--jobs", "2", "--", *arguments(tmp_path, TESTS)]) == 1
    failed = {"test_fails", "test_ends_its_process", "test_leaves_a_useless_context"}
    assert outcomes(found) == {
        **{f"test_passes[{n}]": "passed" for n in range(8)},
        **dict.fromkeys(failed, "failed"),
        "test_after_which_its_process_cannot_end_well": "passed",
        "test_is_skipped": "skipped",
        "test_needs_the_card_alone": "passed",  # when it was
    }
    said = capsys.readouterr().out
    assert said.endswith("10 passed, 3 failed, 1 skipped\n")
    for why in ("a reason", "its process ended with status 9", "an illegal memory access", "it needs two cards"):
        assert why in said


@pytest.mark.exhaustive
def test_one_that_was_stopped_is_gone_on_with_and_is_no_pass_before(tmp_path: Path) -> None:
    slow = "import pytest, time\n@pytest.mark.skipif({}, reason='not built')\ndef test_skipped(): pass\n"
    slow += "def test_a(): pass\ndef test_b(): time.sleep({})\ndef test_c(): pass\n"
    found = tmp_path / "found"
    command = [sys.executable, "-m", "benchmarks.card.pool", "--folder", str(found), "--jobs", "1", "--"]
    tests = arguments(tmp_path, slow.format(1, 1000))
    with subprocess.Popen([*command, *tests], cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        until = time.monotonic() + 60
        while "test_a" not in outcomes(found) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == pool.UNPROVEN
    assert "stopped before the end, in the middle of\n" in said
    assert said.splitlines()[1].endswith("::test_b")
    assert said.endswith("1 passed, 1 skipped, 2 left\n")
    (tmp_path / "gpu" / "test_them.py").write_text(slow.format(0, 0))
    assert subprocess.run([*command, *tests], cwd=ROOT, capture_output=True).returncode == 0
    assert outcomes(found) == dict.fromkeys(("test_skipped", "test_a", "test_b", "test_c"), "passed")
    lines = (found / "verdicts.jsonl").read_text().splitlines()
    assert len(lines) == 5  # one that had passed was not run again; what is needed may have been built since


@pytest.mark.exhaustive
def test_what_cannot_be_collected_is_no_pass_either(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "found"
    assert pool.main(["--folder", str(found), "--jobs", "1", "--", *arguments(tmp_path, "import no_such_module")]) == 1
    assert "before any test, see worker-0.log" in capsys.readouterr().out
    assert "no_such_module" in (found / "worker-0.log").read_text()


def test_a_card_on_which_all_is_skipped_is_not_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "collected.json").write_text(json.dumps(["a"]))
    write(tmp_path, "a", "skipped", 0.0, "no card")
    assert pool.Pool(tmp_path, []).report() == pool.UNPROVEN
    assert "skipped 1: no card" in capsys.readouterr().out


def test_a_verdict_that_was_cut_off_is_none(tmp_path: Path) -> None:
    write(tmp_path, "a", "passed", 0.0, "")
    write(tmp_path, "b", "failed", 0.0, "because")
    file = tmp_path / "verdicts.jsonl"
    file.write_text(file.read_text()[:-9])
    assert verdicts(tmp_path).keys() == {"a"}
