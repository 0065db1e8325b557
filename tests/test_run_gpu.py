"""The run on a GPU: its shares of the time, what it says of each part, what it brings home, and a rehearsal of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch

from benchmarks import run_gpu
from benchmarks.card import delivery, gpu_parts
from benchmarks.card.gpu_parts import STAGES, Part
from benchmarks.measuring.records import Report
from benchmarks.run_gpu import LIMIT, RESERVE, Outcome, Stage, status

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

    def run(self, work: Path, parts: list[Part], stage: str = "tests") -> list[Outcome]:
        self.allowed.clear()
        return Stage(stage, work, self.now, self.start, lambda: self.now).run(parts)


def shares(**seconds: float) -> list[Part]:
    return [Part(name, share, ()) for name, share in seconds.items()]


# the parts of a stage


def test_a_slow_part_cannot_eat_the_share_of_others_and_a_quick_one_leaves_its_own(tmp_path: Path) -> None:
    machine = Machine(quick=(1.0, 0), slow=(500.0, 0), bad=(2.0, 4), last=(5.0, 0))
    parts = shares(quick=10, slow=20, bad=30, last=40)
    parts.insert(2, Part("absent", 7, (), ("no-such-program",), optional=True))
    outcomes = machine.run(tmp_path, parts)
    assert machine.allowed == {"quick": 10, "slow": 29, "bad": 37, "last": 75}
    assert [(o.name, o.status) for o in outcomes] == [
        ("quick", "ok"), ("slow", "not proven"), ("absent", "skipped"), ("bad", "failed"), ("last", "ok"),
    ]  # fmt: skip
    assert outcomes[1].note == "the time was too short, see slow.log"
    assert outcomes[2].note == "no-such-program is not here"
    assert outcomes[3].note == "exit status 4, see bad.log"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert [Outcome(**o) for o in summary["tests"]] == outcomes


def test_what_ran_out_of_time_is_no_pass() -> None:
    ok, late, bad = (Outcome("part", word, 1.0) for word in ("ok", "not proven", "failed"))
    assert [status(found) for found in ([ok], [ok, late], [late, bad, ok], [])] == [0, 3, 1, 0]


def test_a_part_that_says_so_itself_is_not_proven_nor_is_one_that_lacks_something(tmp_path: Path) -> None:
    machine = Machine(short=(1.0, 3))
    outcomes = machine.run(tmp_path, [*shares(short=10), Part("absent", 10, (), ("no-such-program",))])
    assert [o.status for o in outcomes] == ["not proven", "not proven"]


def test_no_share_reaches_beyond_the_limit_of_a_call(tmp_path: Path) -> None:
    machine = Machine(first=(LIMIT, 0), second=(1.0, 0))
    outcomes = machine.run(tmp_path, shares(first=2 * LIMIT, second=100))
    assert machine.allowed == {"first": LIMIT - RESERVE}
    assert (outcomes[1].status, outcomes[1].note) == ("not proven", "no time was left")


def test_a_second_call_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    machine = Machine(whole=(1.0, 0), gone=(1.0, 0), slow=(25.0, 0), bad=(1.0, 1), page=(1.0, 0))
    parts = shares(whole=10, gone=10, slow=20, bad=10, page=10)
    parts[1] = Part("gone", 10, (), makes=(kept,))
    parts[4] = Part("page", 10, (), sums_up=True)
    kept.mkdir()
    machine.takes["slow"] = (1000.0, 0)
    assert [o.status for o in machine.run(tmp_path, parts)] == ["ok", "ok", "not proven", "failed", "ok"]
    kept.rmdir()  # as on another machine, which has what was found and not what was built
    machine.takes["slow"] = (25.0, 0)
    outcomes = machine.run(tmp_path, parts)
    assert list(machine.allowed) == ["gone", "slow", "bad", "page"]
    assert [o.status for o in outcomes] == ["ok", "ok", "ok", "failed", "ok"]
    assert machine.allowed["slow"] == 39.0  # with the share of what had been done
    assert outcomes[0].seconds == 1.0  # what it took then
    machine.takes["bad"] = (1.0, 0)
    kept.mkdir()
    machine.run(tmp_path, parts)
    assert list(machine.allowed) == ["bad", "page"]
    machine.run(tmp_path, parts)
    assert machine.allowed == {}
    machine.run(tmp_path, shares(whole=10), stage="bench")
    assert list(machine.allowed) == ["whole"]  # stages do not know of each other
    assert json.loads((tmp_path / "summary.json").read_text()).keys() == {"tests", "bench"}


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


def test_a_card_that_does_not_answer_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_gpu, "CARD", "import time; time.sleep(100)")
    monkeypatch.setattr(run_gpu, "SILENT", 0.1)
    assert run_gpu.main(["tests"]) == 2
    assert "no answer within" in capsys.readouterr().err


def test_what_a_part_needs() -> None:
    assert run_gpu.missing(["python:torch", "sh"]) is None
    assert run_gpu.missing(["python:no_such_module"]) == "no_such_module cannot be imported"


def test_every_stage_fits_into_a_call_and_the_kernels_are_compiled_before_they_are_tested(tmp_path: Path) -> None:
    assert LIMIT <= 9 * 60
    for stage in STAGES:
        for architecture in ("sm_90", None):
            parts = gpu_parts.parts(stage, tmp_path, architecture)
            assert sum(part.seconds for part in parts) <= LIMIT - RESERVE
            # the built-in tables count, or what is tuned here: the user's file is neither read nor written
            for part in parts:
                if part.name not in ("info", "build", "pictures", "page"):
                    assert Path(part.environment["SPARSE_FFN_TUNED"]).is_relative_to(tmp_path)
                    assert Path(part.environment["TRITON_CACHE_DIR"]).is_relative_to(tmp_path)
        names = [part.name for part in gpu_parts.parts(stage, tmp_path, "sm_90")]
        rehearsed = [part.name for part in gpu_parts.parts(stage, tmp_path, None)]
        only = {"gate", "memcheck", "racecheck", "authors", "authors-cvmm", "candidates", "crossovers", "tuned"}
        assert [name for name in names if name not in only][: len(rehearsed)] == rehearsed
    names = [part.name for part in gpu_parts.parts("tests", tmp_path, "sm_90")]
    assert names[:4] == ["info", "build", "gate", "tests"]


def test_results_of_another_state_of_the_code_are_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = run_gpu.code("2.11", "3.6")
    assert here == run_gpu.code("2.11", "3.6") != run_gpu.code("2.11", "3.7")
    monkeypatch.setattr(run_gpu, "ROOT", tmp_path)
    assert run_gpu.code("2.11", "3.6") != here
    empty = run_gpu.code()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "new.py").write_text("")
    assert run_gpu.code() != empty


# what is brought home


def run_of(work: Path) -> None:
    for name in ("summary.json", "layers.json", "layers.png", "core/lib.so", "triton/a/b/kernel.cubin", "page/a/b.svg"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    (work / "tests.log").write_bytes(b"begin" + b"." * (3 * delivery.LOG) + b"end")


def test_an_archive_a_summary_and_pictures_are_brought_home(tmp_path: Path) -> None:
    work, out = tmp_path / "card-1234", tmp_path / "out"
    run_of(work)
    assert delivery.deliver(work, out, ["core", "triton"]) == []
    assert sorted(p.name for p in out.rglob("*")) == ["card-1234.tar.gz", "layers.png", "summary.json"]
    delivery.unpack(out / "card-1234.tar.gz", tmp_path / "elsewhere", "card-1234")
    there = tmp_path / "elsewhere" / "card-1234"
    files = sorted(str(p.relative_to(there)) for p in there.rglob("*") if p.is_file())
    assert files == ["layers.json", "layers.png", "page/a/b.svg", "summary.json", "tests.log"]
    log = (there / "tests.log").read_bytes()
    assert log.startswith(b"begin.")
    assert log.endswith(b".end")
    assert len(log) < 1.1 * delivery.LOG


def test_another_cards_archive_or_a_damaged_one_is_refused(tmp_path: Path) -> None:
    work = tmp_path / "card-1234"
    run_of(work)
    delivery.deliver(work, tmp_path / "out", [])
    archive = tmp_path / "out" / "card-1234.tar.gz"
    with pytest.raises(ValueError, match=r"is of card-1234, and this is card-5678"):
        delivery.unpack(archive, tmp_path / "elsewhere", "card-5678")
    archive.write_bytes(archive.read_bytes()[:50])
    with pytest.raises(ValueError, match="cannot be read"):
        delivery.unpack(archive, tmp_path / "elsewhere", "card-1234")
    assert not (tmp_path / "elsewhere").exists()


def test_what_is_beyond_the_limits_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BYTES", 5)
    for name in ("a/b/within", "a/b/c/deep", "with space", *"1234567"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "7").write_text("123456")
    assert delivery.beyond(tmp_path) == [
        "10 files, at most 8",
        "7 has 6 bytes, at most 5",
        "a/b/c/deep is deeper than 2 folders",
        "with space has a name that is not made of letters, digits, '.', '_' and '-'",
    ]


# the command


@pytest.mark.exhaustive
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run")
def test_without_a_gpu_it_says_so() -> None:
    command, own = [ROOT / "benchmarks" / "run_gpu.sh", "tests"], {**os.environ, "PYTHON": sys.executable}
    found = subprocess.run(command, capture_output=True, text=True, env=own)
    assert found.returncode == 2
    assert "no GPU that torch can use" in found.stderr


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is no rehearsal")
def test_rehearsal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Every stage once, at tiny sizes, within the limits; then the first one again, which has nothing left to do."""
    monkeypatch.setattr(run_gpu, "RUNS", tmp_path / "runs")
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}:{ROOT}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for stage in STAGES:
        begin = time.monotonic()
        code = run_gpu.main([stage, "--rehearse"])
        (work,) = (tmp_path / "runs").glob("rehearsal-*")
        logs = {p.name: p.read_text()[-500:] for p in work.glob("*.log")}
        assert code == 0, (capsys.readouterr(), logs)
        assert time.monotonic() - begin < LIMIT
        assert delivery.beyond(tmp_path / "out") == []
    summary = json.loads((work / "summary.json").read_text())
    optional = {o["name"] for found in summary.values() for o in found if o["status"] == "skipped"}
    assert optional <= {"build", "pictures", "page"}  # without a compiler or matplotlib
    assert [row.results[0].status for row in Report.load(work / "layers.json").rows] == ["timed"]
    for part in ("cvmm", "sweeps"):
        assert Report.load(work / f"{part}.json").rows
    assert "tiles in" in (work / "tune.log").read_text()
    assert {o["name"]: o["note"] for o in summary["tests"]}["tests"] == "1 passed, 1 skipped"
    if not optional:
        assert f"**{work.name}** (" in (work / "page" / "benchmarks-targets.md").read_text()
        assert (tmp_path / "out" / "layers.png").is_file()
    with tarfile.open(tmp_path / "out" / f"{work.name}.tar.gz") as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    assert {"summary.json", "layers.json", "tests.log", "tests/verdicts.jsonl"} <= names
    assert not (work / "none").exists()

    capsys.readouterr()
    assert run_gpu.main(["tests", "--rehearse"]) == 0
    assert capsys.readouterr().out.count("in an earlier call") == 3
    again = json.loads((work / "summary.json").read_text())["tests"]
    assert [o["seconds"] for o in again] == [o["seconds"] for o in summary["tests"]]


AS_IF_ON_A_CARD = """
import os

import torch

torch.cuda.is_available = lambda: True
torch.cuda.Stream = lambda *arguments, **options: None


def pytest_collection_finish(session):
    import importlib
    import pkgutil

    import sparse_ffn.backends.triton as kernels
    from triton.runtime.interpreter import InterpretedFunction

    modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
    found = {name for m in modules for name, of in vars(m).items() if isinstance(of, InterpretedFunction)}
    print("variable:", os.environ.get("TRITON_INTERPRET"), "interpreted:", sorted(found), "tests:", len(session.items))
"""


def test_on_a_card_no_kernel_is_interpreted(tmp_path: Path) -> None:
    """Any module that sets the variable while tests are collected would have later modules' kernels interpreted."""
    pytest.importorskip("triton")
    (tmp_path / "as_if_on_a_card.py").write_text(AS_IF_ON_A_CARD)
    files = ("tests/gpu", "tests/test_cuda.py", "tests/test_offload.py", "tests/test_gpu_peers.py")
    command = [sys.executable, "-m", "pytest", "-p", "as_if_on_a_card", "-p", "no:cacheprovider", "-o", "addopts="]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), "src", "."])
    collect = [*command, "-q", "--collect-only", *files]
    done = subprocess.run(collect, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert "variable: None interpreted: [] tests: " in done.stdout, done.stdout + done.stderr
