"""The run on a GPU: its shares of the time, what it says of each part, and a rehearsal of all of it on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import run_gpu
from benchmarks.records import Report
from benchmarks.run_gpu import Outcome, Part, run

ROOT = Path(__file__).parents[1]


class Machine:
    """Parts take these seconds, if they are allowed to, and end with these codes."""

    def __init__(self, **takes: tuple[float, int]) -> None:
        self.takes, self.now = takes, 100.0
        self.allowed: dict[str, float] = {}

    def start(self, part: Part, seconds: float, log: Path) -> int | None:
        self.allowed[part.name] = seconds
        wanted, code = self.takes[part.name]
        self.now += min(wanted, seconds)
        return code if wanted <= seconds else None


def test_a_slow_part_cannot_eat_the_share_of_others_and_a_quick_one_leaves_its_own(tmp_path: Path) -> None:
    machine = Machine(quick=(1.0, 0), slow=(500.0, 0), bad=(2.0, 3), last=(5.0, 0))
    parts = [Part(name, seconds, ()) for name, seconds in (("quick", 10), ("slow", 20), ("bad", 30), ("last", 40))]
    parts.insert(2, Part("absent", 7, (), ("no-such-program",)))
    outcomes = run(parts, tmp_path, machine.start, lambda: machine.now)
    assert machine.allowed == {"quick": 10, "slow": 29, "bad": 37, "last": 75}
    assert [(o.name, o.status) for o in outcomes] == [
        ("quick", "ok"), ("slow", "out of time"), ("absent", "skipped"), ("bad", "failed"), ("last", "ok"),
    ]  # fmt: skip
    assert outcomes[2].note == "no-such-program is not here"
    assert outcomes[3].note == "exit status 3, see bad.log"
    assert [Outcome(**o) for o in json.loads((tmp_path / "summary.json").read_text())] == outcomes


def test_a_part_is_stopped_with_all_its_processes_and_its_log_stays(tmp_path: Path) -> None:
    assert run_gpu.start(Part("endless", 1, ("sh", "-c", "sleep 1000 & echo $!; wait")), 2.0, tmp_path / "log") is None
    child = Path("/proc", (tmp_path / "log").read_text().strip(), "stat")
    until = time.monotonic() + 20
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.1)  # the kernel takes its time
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_a_part_has_its_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBRARY", "installed.so")
    part = Part("say", 60, ("sh", "-c", "echo $SAID $LIBRARY"), (), {"SAID": "hello", "LIBRARY": "/not/built.so"})
    assert run_gpu.start(part, 60.0, tmp_path / "log") == 0
    assert (tmp_path / "log").read_text() == "hello installed.so\n"


def test_what_a_part_needs() -> None:
    assert run_gpu.missing(["python:torch", "sh"]) is None
    assert run_gpu.missing(["python:no_such_module"]) == "no_such_module cannot be imported"


def test_all_of_it_takes_less_than_ten_minutes_and_tests_come_first(tmp_path: Path) -> None:
    parts = run_gpu.parts(tmp_path, rehearse=False)
    assert sum(part.seconds for part in parts) <= 595
    names = [part.name for part in parts]
    assert names[:4] == ["info", "build", "tests-gpu", "tests-compiled"]
    rehearsed = {part.name for part in run_gpu.parts(tmp_path, rehearse=True)}
    assert set(names) - rehearsed == {"tuned", "sanitizer", "races"}
    # the benchmarks take the built-in tables, tuning its own folder: the user's file is neither read nor written
    for part in parts:
        if part.name in ("layers", "cvmm", "sweeps", "tune", "tuned"):
            assert Path(part.environment["SPARSE_FFN_TUNED"]).is_relative_to(tmp_path)


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    assert run_gpu.main([]) == 2
    assert "no GPU that torch can use" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is no rehearsal")
def test_rehearsal(tmp_path: Path) -> None:
    """Every part once, at tiny sizes, through the script itself."""
    environment = os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    command = [str(ROOT / "benchmarks" / "run_gpu.sh"), "--rehearse"]
    found = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr
    out = tmp_path / "rehearsal"
    outcomes = {o["name"]: o for o in json.loads((out / "summary.json").read_text())}
    logs = {name: (out / f"{name}.log").read_text()[-500:] for name, o in outcomes.items() if o["status"] == "failed"}
    assert logs == {}
    assert {name for name, o in outcomes.items() if o["status"] != "ok"} <= {"page"}  # without matplotlib
    assert [row.results[0].status for row in Report.load(out / "layers.json").rows] == ["timed"]
    for part in ("cvmm", "sweeps"):
        assert Report.load(out / f"{part}.json").rows
    assert "tiles in" in (out / "tune.log").read_text()
    assert "passed" in (out / "tests-compiled.log").read_text()
    if outcomes["page"]["status"] == "ok":
        assert "**rehearsal** (" in (out / "page" / "benchmarks-targets.md").read_text()
    assert not (tmp_path / "none").exists()
