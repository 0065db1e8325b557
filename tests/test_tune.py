"""Tuning without a GPU: what is tried, checked, timed, chosen and stored, and what counts then; times are made up."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import sparse_ffn as sf
from sparse_ffn import info, ops
from sparse_ffn.backends import cpu, crossovers, kept, versions
from sparse_ffn.backends.triton import candidates, columns, config, tuned
from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.triton.tuned import Card, Tuned
from sparse_ffn.tune import __main__ as command
from sparse_ffn.tune import crossings
from sparse_ffn.tune.problems import Problem, choices, heights, problems
from sparse_ffn.tune.search import Search, merged

CPU, CARD = torch.device("cpu"), Card("NVIDIA H100 80GB HBM3", "sm_90")
ENTRIES = list(config.launchable("sm_90"))
CACHE = 0
"""Bytes of a card's, of which nothing stays."""
PROBLEM = Problem("half", 2048, 64, 8, 128, 1024, glu=False)
BEST, GOOD = Tile.parse("128x128x32/8/5"), Tile.parse("128x128x64/8/4")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(kept.DIRECTORY_VARIABLE, str(tmp_path / "tuned"))
    return tmp_path / "tuned"


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device that is taken for an H100."""
    monkeypatch.setattr(Card, "of", classmethod(lambda cls, device: CARD))
    monkeypatch.setattr(config, "_of_device", lambda device: "sm_90")
    config._from_file.cache_clear()
    yield torch.device("cuda")
    config._from_file.cache_clear()


# tiles and candidates


def test_a_tile_is_written_as_it_is_read() -> None:
    assert str(Tile.parse("128x64x32/8/4")) == "128x64x32/8/4"
    for wrong in ("128x64/8/4", "axbxc/1/1", ""):
        with pytest.raises(ValueError, match="a tile is written"):
            Tile.parse(wrong)


@pytest.mark.parametrize("name", candidates.TABLES)
def test_candidates_have_heights_of_the_tables(name: str) -> None:
    """Else a call could take a height for which another of its kernels has no tile."""
    for kernel, kind, tile in config.entries(candidates.TABLES[name]):
        known = {t.m for t in config.TABLES[name]["one", kind]} & {t.m for t in config.TABLES[name]["two", kind]}
        assert kernel == "outer" or tile.m in known
        assert tile not in config.TABLES[name][kernel, kind]


def test_problems_reach_every_class_of_common_sizes() -> None:
    found = list(problems(["half", "tf32", "half"]))
    assert len(found) == 2 * (4 * 3 + 1) * 2
    assert str(found[0]) == "half ReLU-like: 16384 tokens of 1024, 8 of 64 experts of 128 units"
    assert found[0].coordinates(64, CACHE) == {
        ("one", "half", 64, 128, 1024): False,
        ("one", "half", 64, 1024, 128): False,
        ("two", "half", 64, 128, 1024): False,
        ("outer", "half", 128, 1024, 1024): True,
    }
    assert ("one", "half", 64, 128, 128) in found[0].coordinates(64, 50 << 20)  # an H100's: blocks stay in its cache
    assert found[-1].coordinates(16, CACHE)["one", "tf32", 16, 1024, 64] is False
    assert found[6].coordinates(128, CACHE)["one", "half", 128, 1024, 1024] is True  # of experts of 1024 units
    assert heights(ENTRIES, found[0]) == [128, 64]
    assert [heights(ENTRIES, p) for p in found[8:24:6]] == [[64, 32], [32, 16], [16]]


def test_choices_are_no_wider_than_their_class() -> None:
    for coordinate in found_coordinates():
        tiles = choices(ENTRIES, coordinate, large=True)
        assert tiles
        small = choices(ENTRIES, coordinate, large=False)
        assert coordinate[0] == "outer" or all(t.m * t.n <= config.MOST for t in small)
        assert all(t.n <= coordinate[3] for t in tiles)
        assert all((t.m <= coordinate[2]) if coordinate[0] == "outer" else t.m == coordinate[2] for t in tiles)
    wide = Tile.parse("128x256x64/8/3")
    coordinate = ("one", "half", 128, 1024, 1024)
    assert [large for large in (False, True) if wide in choices(ENTRIES, coordinate, large)] == [True]


def found_coordinates() -> set[tuned.Key]:
    return {c for p in problems(["half", "tf32"]) for m in heights(ENTRIES, p) for c in p.coordinates(m, CACHE)}


# the search


class Made:
    """A runner whose times are made up: 100, less what the table's tiles save; some are wrong."""

    def __init__(self, saves: dict[Tile, float], wrong: set[Tile] = frozenset(), per_call: float = 1.0) -> None:  # type: ignore[assignment]
        self.saves, self.wrong, self.per_call, self.now = saves, wrong, per_call, 0.0
        self.checked: list[list[Tile]] = []
        self.timed: list[list[Tile]] = []

    def check(self, problem: Problem, table: Tuned) -> str | None:
        self.now += self.per_call
        self.checked.append(list(table.tiles.values()))
        return "wrong" if self.wrong & set(table.tiles.values()) else None

    def seconds(self, problem: Problem, table: Tuned) -> float:
        assert self.checked[-1] == list(table.tiles.values()), "timed without a check"
        self.timed.append(self.checked[-1])
        height = dict(table.heights)[problem.kind, 128]
        return 100 + (height == 64) * 5 - sum(self.saves.get(t, 0.0) for t in table.tiles.values())


def search(runner: Made, seconds: float = 1e9, **options: object) -> Search:
    return Search(
        ENTRIES, runner, cache=CACHE, seconds=seconds, say=lambda line: None, clock=lambda: runner.now, **options
    )  # type: ignore[arg-type]


def test_the_best_tile_of_each_class_is_chosen() -> None:
    wide = Tile.parse("128x256x64/8/5")
    runner = Made({BEST: 10.0, GOOD: 7.0, wide: 12.0})
    decided = search(runner)
    assert decided.run([PROBLEM])
    assert decided.found.heights == {("half", 128): 128}
    assert decided.found.tiles == {
        ("one", "half", 128, 128, 1024): BEST,
        ("one", "half", 128, 1024, 128): BEST,
        ("outer", "half", 128, 1024, 1024): wide,
    }


def test_a_wrong_tile_is_never_timed() -> None:
    runner = Made({BEST: 50.0}, wrong={BEST})
    decided = search(runner)
    decided.run([PROBLEM])
    assert [BEST] in [c[-1:] for c in runner.checked]
    assert not any(BEST in tiles for tiles in runner.timed)
    assert BEST not in decided.found.tiles.values()


def test_a_gain_within_the_noise_changes_nothing() -> None:
    decided = search(Made({BEST: 1.0}))
    decided.run([PROBLEM])
    assert decided.found.tiles == {}


def test_another_height_wins_with_its_own_tiles() -> None:
    decided = search(Made({Tile.parse("64x256x64/8/3"): 30.0}))
    decided.run([PROBLEM])
    assert decided.found.heights == {("half", 128): 64}
    assert decided.found.tiles["one", "half", 64, 1024, 128] == Tile.parse("64x256x64/8/3")


def test_classes_are_decided_once() -> None:
    runner = Made({})
    decided = search(runner)
    decided.run([PROBLEM])
    n = len(runner.checked)
    decided.run([PROBLEM])
    assert len(runner.checked) == n


def test_only_the_kernels_asked_for() -> None:
    decided = search(Made({BEST: 10.0, GOOD: 7.0}), kernels=["outer"])
    decided.run([PROBLEM])
    assert {kernel for kernel, *_ in decided.found.tiles} == {"outer"}


def test_what_was_measured_before_the_time_was_up_is_kept() -> None:
    full = Made({BEST: 10.0})
    search(full).run([PROBLEM])
    kept: list[Tuned] = []
    for seconds in range(len(full.checked)):
        runner = Made({BEST: 10.0})
        decided = search(runner, seconds=seconds)
        assert not decided.run([PROBLEM], kept.append)
        assert runner.now <= seconds + 1
        assert decided.found.heights == {}  # not all heights were tried
    assert kept[0].tiles == {}
    assert kept[-1].tiles["one", "half", 128, 1024, 128] == BEST


def test_a_search_goes_on_where_another_was_stopped(folder: Path) -> None:
    whole = Made({BEST: 10.0})
    expected = search(whole)
    expected.run([PROBLEM])
    first = search(Made({BEST: 10.0}), seconds=len(whole.checked) * 2 // 3)
    assert not first.run([PROBLEM])
    tuned.save(first.found, CARD)
    rest = Made({BEST: 10.0})
    second = search(rest, before=tuned.load(CARD, ENTRIES))
    assert second.run([PROBLEM])
    assert second.found == expected.found
    assert len(rest.checked) <= len(whole.checked) * 2 // 3  # half of the classes had been decided
    tuned.save(second.found, CARD)
    third = Made({})
    assert search(third, before=tuned.load(CARD, ENTRIES)).run([PROBLEM])
    assert third.checked == []


def test_an_earlier_run_counts_where_this_one_measured_nothing() -> None:
    a, b = ("one", "half", 64, 128, 64), ("one", "half", 64, 1024, 64)
    before = Tuned({("half", 64): 64}, {a: Tile(64, 64, 64, 4, 4), b: Tile(64, 64, 64, 4, 4)})
    both = merged(before, Tuned({}, {b: Tile(64, 128, 64, 4, 4)}))
    assert both == Tuned({("half", 64): 64}, {a: Tile(64, 64, 64, 4, 4), b: Tile(64, 128, 64, 4, 4)})
    assert merged(None, before) is before


# the file


def measured() -> Tuned:
    return Tuned({("half", 128): 64}, {("one", "half", 64, 1024, 128): Tile.parse("64x256x64/8/3")})


def test_the_file_lies_where_the_platform_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(kept.DIRECTORY_VARIABLE, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert kept.directory() == tmp_path / ".cache" / "sparse-ffn"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert kept.directory() == tmp_path / "cache" / "sparse-ffn"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/not/allowed")
    assert kept.directory() == tmp_path / ".cache" / "sparse-ffn"
    monkeypatch.setenv(kept.DIRECTORY_VARIABLE, "~/mine")
    assert CARD.path == tmp_path / "mine" / "nvidia-h100-80gb-hbm3-sm_90.json"


def test_a_user_without_a_home_has_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (kept.DIRECTORY_VARIABLE, "HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    assert tuned.load(CARD, ENTRIES) is None
    with pytest.raises(FileNotFoundError, match="set SPARSE_FFN_TUNED to a folder"):
        tuned.save(measured(), CARD)
    assert not any(tmp_path.iterdir())


def test_a_file_is_read_as_it_was_written(folder: Path) -> None:
    assert tuned.load(CARD, ENTRIES) is None  # and no warning: nobody tuned
    assert tuned.save(measured(), CARD, torch="2.x") == CARD.path
    assert tuned.load(CARD, ENTRIES) == measured()
    assert [p.name for p in folder.iterdir()] == [CARD.path.name]  # nothing half written is left


def broken(folder: Path, **changes: object) -> None:
    data = json.loads(CARD.path.read_text()) | changes
    CARD.path.write_text(json.dumps(data))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"versions": {"triton": "1.0", "kernels": "old"}}, "its versions is {'triton': '1.0'"),
        ({"format": 0}, "its format is 0, here it is 2"),
        ({"card": "NVIDIA A100"}, "its card is 'NVIDIA A100', here it is"),
        (
            {"tiles": [["one", "half", 64, 1024, 64, "64x64x64/4/17"]]},
            "one half 64x64x64/4/17",
        ),  # the gate never saw it
        ({"tiles": [["one", "half", 128, 1024, 64, "64x64x64/4/4"]]}, "one half 64x64x64/4/4"),  # not of that height
        ({"tiles": [["one", "half", 64, 1024, 64, "large"]]}, "a tile is written"),
        ({"tiles": [["one"]]}, "damaged"),
        ({"heights": [["bf16", math.inf, 64]]}, "damaged"),
        ({"heights": [["bf16", 16, "1" * 5000]]}, "damaged"),
        ({"tiles": [["one", "bf16", 64, 64, 64, {"a": 1}]]}, "damaged"),
        ({"tiles": [["one", "bf16", 64, 64, 64, "__import__('os')"]]}, "damaged"),
        ({"tiles": 3}, "not a table of tiles"),
        ({"heights": [["half", 128, 48]]}, "half of 48 rows"),
    ],
)
def test_a_useless_file_is_said_to_be_and_not_used(changes: dict[str, object], why: str, folder: Path) -> None:
    tuned.save(measured(), CARD)
    broken(folder, **changes)
    with pytest.warns(sf.SparseFFNWarning, match=why):
        assert tuned.load(CARD, ENTRIES) is None


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"[" * 200_000, b"[" + b"1" * 5000 + b"]"])
def test_so_is_a_damaged_one(content: bytes, folder: Path) -> None:
    folder.mkdir()
    CARD.path.write_bytes(content)
    with pytest.warns(sf.SparseFFNWarning, match="not used"):
        assert tuned.load(CARD, ENTRIES) is None


# what counts


def test_what_was_measured_goes_before_the_tables(folder: Path, card: torch.device) -> None:
    tuned.save(measured(), CARD)
    assert config.block_m(card, "half", 2000) == 64
    assert config.tile(card, "one", "half", 900, 100, 64) == Tile.parse("64x256x64/8/3")
    # and where nothing was measured the tables do
    assert config.block_m(card, "half", 20) == 32
    assert config.tile(card, "one", "half", 64, 100, 64) == Tile.parse("64x64x64/4/4")
    assert config.tile(card, "outer", "half", 900, 100, side=128) == Tile.parse("128x128x64/8/5")


def test_a_tile_that_was_measured_for_short_sums_is_not_taken_for_long_ones(folder: Path, card: torch.device) -> None:
    short, long, built_in = (Tile.parse(text) for text in ("128x128x32/8/5", "128x256x64/8/3", "128x128x64/8/3"))
    with config.using(Tuned({}, {("one", "half", 128, 1024, 64): short, ("one", "half", 128, 1024, 1024): long})):
        found = [config.tile(card, "one", "half", 900, depth, 128, alone=True) for depth in (64, 128, config.DEEP)]
        assert found == [short, built_in, long]
        assert config.tile(card, "one", "half", 900, config.DEEP, 128) == built_in  # other things are in registers


def test_every_height_that_tuning_may_choose_has_a_tile_for_every_kernel(card: torch.device, folder: Path) -> None:
    for problem in problems(["half", "tf32", "fp32"]):
        for m in heights(ENTRIES, problem):
            with config.using(Tuned({(problem.kind, 128): m})):
                for kernel in ("one", "two"):
                    assert config.tile(card, kernel, problem.kind, problem.D, problem.G, m).m == m


def test_the_file_is_read_once_and_warned_about_once(folder: Path, card: torch.device) -> None:
    folder.mkdir()
    CARD.path.write_text("{")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiles = {config.tile(card, "one", "half", 64, 64, 64) for _ in range(3)}
    assert tiles == {Tile.parse("64x64x64/4/4")}
    assert ["python -m sparse_ffn.tune" in str(w.message) for w in caught] == [True]


def test_the_gate_and_fixed_tiles_ignore_the_file(folder: Path, card: torch.device) -> None:
    tuned.save(measured(), CARD)
    with config.fixed(architecture="sm_90"):
        assert config.block_m(card, "half", 2000) == 128
    with config.fixed(Tile(16, 16, 16, 4, 2)):
        assert config.tile(card, "one", "half", 900, 64, 64).m == 16


def test_on_a_cpu_no_file_is_read(folder: Path) -> None:
    folder.mkdir()
    CARD.path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert config.block_m(CPU, "half", 2000) == 128


# the command


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would measure")
def test_without_a_gpu_the_command_says_so(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert command.main([]) == 2
    assert "measures on a GPU, and torch sees none" in capsys.readouterr().err
    assert command.main(["--device", "meta"]) == 2
    assert "meta is none" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card's own table")
def test_a_dry_run_shows_what_would_be_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--dry-run", "--dtype", "bf16", "fp16", "--kernels", "outer"]) == 0
    out = capsys.readouterr().out
    assert "no GPU here, so for sm_90" in out
    assert "outer half 128 1024 1024: " in out
    assert "one half" not in out
    assert out.count("16384 tokens") == 8  # bf16 and fp16 are one arithmetic


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card's own numbers of tokens")
def test_a_dry_run_shows_a_gpus_crossovers_without_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--crossovers", "--dry-run", "--dtype", "bf16"]) == 0
    assert "Would time decode, sorted at 1, 2, 4" in capsys.readouterr().out
    assert command.main(["--crossovers"]) == 2


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--layer 8 4 6 2", "--layer: is of crossovers"),
        ("--device cpu --dtype tf32", "--dtype: crossovers are of bf16, fp16, fp32, got tf32"),
        ("--device cpu --kernels one", "--kernels: is of block sizes"),
        ("--crossovers --resume", "--resume: is of block sizes"),
        ("--crossovers --verbose", "--verbose: is of block sizes"),
    ],
)
def test_options_without_effect_are_refused(arguments: str, why: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(arguments.split())
    assert why in capsys.readouterr().err


def test_the_help_says_where_the_file_lies(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--help"])
    assert kept.DIRECTORY_VARIABLE in capsys.readouterr().out


def test_a_card_that_triton_refuses_is_told_of_before_anything_is_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "unavailable", lambda name, device: f"{name}: the card is too old")
    assert command.main(["--dtype", "bf16"]) == 2
    assert "measures on a GPU, and triton: the card is too old" in capsys.readouterr().err
    assert not list(folder.glob("*"))


def test_a_problem_of_which_nothing_runs_is_told_of() -> None:
    runner, said = Made({}), list[str]()
    runner.check = lambda problem, table: "does not run"  # type: ignore[method-assign]
    found = search(runner)
    found.say = said.append
    assert not found.run([PROBLEM])
    assert f"{PROBLEM}: no tile computes it right here (--verbose says why of each)" in said


def test_a_triton_of_another_distribution_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")

    def nowhere(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(versions, "version", nowhere)
    tuned.versions.cache_clear()
    try:
        assert tuned.versions()["triton"] == info.version("triton") == triton.__version__
    finally:
        tuned.versions.cache_clear()
    assert info.version("nobody_has_this") == info.version("contextlib") == "not installed"


def test_the_command_stores_what_it_finds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder: Path, card: torch.device
) -> None:
    """All of it but the card: times are made up, the budget is that of the clock on the wall."""
    from sparse_ffn.tune import runner, stopwatch

    made = Made({BEST: 10.0}, per_call=0.0)
    monkeypatch.setattr(command, "_no_gpu", lambda device: None)
    monkeypatch.setattr(command, "problems", lambda kinds: [PROBLEM])
    monkeypatch.setattr(columns, "cache_bytes", lambda device: CACHE)
    monkeypatch.setattr(stopwatch, "GPUStopwatch", lambda device: None)
    monkeypatch.setattr(runner, "DeviceRunner", lambda device, seconds_of: made)
    earlier = Tuned({("tf32", 16): 16}, {("one", "half", 128, 1024, 128): GOOD})
    tuned.save(earlier, CARD)
    assert command.main(["--dtype", "bf16", "--seconds", "600"]) == 0
    out = capsys.readouterr().out
    assert str(CARD.path) in out
    assert f"one    half  rows  128 columns  1024 depth  128: {BEST}" in out
    stored = tuned.load(CARD, ENTRIES)
    assert stored is not None
    assert stored.tiles["one", "half", 128, 1024, 128] == BEST
    assert stored.heights == {("tf32", 16): 16, ("half", 128): 128}
    config._from_file.cache_clear()
    assert config.tile(card, "one", "half", 1024, 128, 128) == BEST  # a later launch takes it
    n = len(made.checked)
    assert command.main(["--dtype", "bf16", "--seconds", "600", "--resume"]) == 0
    assert len(made.checked) == n  # nothing was left
    made.per_call = 1.0
    monkeypatch.setattr(command, "Search", partial(Search, clock=lambda: made.now))
    assert command.main(["--dtype", "bf16", "--seconds", "3"]) == 3
    assert "--resume goes on" in capsys.readouterr().out


def test_the_gpus_stopwatch_hides_the_launches_and_empties_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_ffn.tune import stopwatch

    happened: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            happened.append("event")

        def elapsed_time(self, end: Event) -> float:
            return 2.5  # milliseconds

    class Cache:
        def zero_(self) -> None:
            happened.append("cache")

    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: Cache())
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: happened.append("wait"))
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: happened.append("busy"))
    seconds = stopwatch.GPUStopwatch(torch.device("cuda"))(lambda: happened.append("call"))
    assert seconds == 0.0025
    assert happened == ["wait", "cache", "busy", "event", "call", "event", "wait"]


# where the ways of an expert FFN cross


@pytest.fixture
def crossing(folder: Path) -> Iterator[Path]:
    crossovers._tables.clear()
    yield folder
    crossovers._tables.clear()


def experts(tokens: int) -> tuple[torch.Tensor, ops.Units, torch.Tensor, torch.Tensor]:
    x, keys, values = torch.randn(tokens, 32), torch.randn(6, 20, 32) / 6, torch.randn(6, 20, 24) / 5
    return x, ops.Units(keys, values, None, None), torch.randint(0, 7, (tokens, 3)), torch.rand(tokens, 3)


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no CPU core")
@pytest.mark.parametrize("tokens", [1, 40])
def test_every_way_gives_the_same(tokens: int) -> None:
    arguments, found = experts(tokens), []
    layer = sf.SigmaMoE(32, 6, 20, 3).eval()
    with torch.no_grad():
        expected = ops.expert_ffn(*arguments, activation="gelu"), layer(arguments[0])
        for way in crossings.WAYS:
            with crossovers.using(crossings.WAYS[way]):
                found.append((ops.expert_ffn(*arguments, activation="gelu"), layer(arguments[0])))
    for results in found:
        for a, b in zip(results, expected, strict=True):
            torch.testing.assert_close(a, b)
    assert tokens == 1 or not torch.equal(found[0][0], found[1][0])  # they are two ways


def test_the_choice_is_the_best_way_where_one_crossing_can_say_it() -> None:
    n = [1, 2, 4, 8, 16]
    times = {"decode": {t: 2.0 * t for t in n}, "sorted": {t: 9.0 + t for t in n}}
    assert crossings.choose(times) == 8
    for t in n:
        best = min(of[t] for of in times.values())
        assert times[crossings.way_of(crossings.choose(times), t)][t] <= 1.1 * best
    noise = {"decode": dict(zip(n, (1, 1, 9, 1, 1), strict=True)), "sorted": dict.fromkeys(n, 8.5)}
    assert crossings.choose(noise) == 16  # rather 1.06 of the best once than 8.5 twice


def test_times_that_were_cut_short_tell_only_what_they_saw() -> None:
    device = torch.device("cpu")
    every = list(crossings.tokens(device))
    slower = {"decode": dict.fromkeys(every, 1.0), "sorted": dict.fromkeys(every, 2.0)}
    assert crossings.tell(slower, device)
    few = {way: {n: of[n] for n in every[:3]} for way, of in slower.items()}
    assert not crossings.tell(few, device)
    few["sorted"][every[2]] = 0.5
    assert crossings.tell(few, device)


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(kept.DIRECTORY_VARIABLE, str(tmp_path / "file"))
    monkeypatch.setattr(crossings, "measure", lambda *_: pytest.fail("measured"))
    assert command.main(["--device", "cpu", "--layer", "16", "4", "8", "2", "--dtype", "fp32"]) == 2
    assert f"nothing can be written to {tmp_path / 'file'}" in capsys.readouterr().err


def test_the_folder_may_be_the_current_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(kept.DIRECTORY_VARIABLE, ".")
    assert kept.problem() is None


def test_what_was_measured_counts_for_layers_of_its_class(crossing: Path) -> None:
    layer = crossovers.Layer.of(torch.float32, 1000, 60, 128, 8)
    assert layer == ("float32", 1024, 64, 128, 8)
    keys = torch.empty(60, 128, 1000, device="meta")
    assert crossovers.decode_tokens(torch.float32, keys, 8) == crossovers.DECODE_TOKENS
    path = crossovers.save({layer: 3}, CPU)
    other = crossovers.Layer.of(torch.bfloat16, 64, 4, 4, 2)
    assert crossovers.save({other: 0}, CPU) == path
    assert crossovers.table_of("cpu") == {layer: 3, other: 0}
    assert crossovers.decode_tokens(torch.float32, keys, 8) == 3
    assert crossovers.decode_tokens(torch.bfloat16, keys, 8) == crossovers.DECODE_TOKENS
    assert "float32 1024 64 128 8: decoded up to 3 tokens" in info.report()


def test_what_was_measured_counts_for_its_number_of_threads(crossing: Path) -> None:
    before, keys = torch.get_num_threads(), torch.empty(4, 8, 8, device="meta")
    try:
        for threads, most in ((1, 100), (2, 7)):
            torch.set_num_threads(threads)
            crossovers.save({crossovers.Layer.of(torch.float32, 8, 4, 8, 2): most}, CPU)
        for threads, most in ((2, 7), (1, 100), (3, crossovers.DECODE_TOKENS)):
            torch.set_num_threads(threads)
            assert crossovers.decode_tokens(torch.float32, keys, 2) == most
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "not used"),
        ("[]", "damaged"),
        ('{"kernels": 0}', "its kernels is 0, here it is"),
        ('{"crossovers": [["float32", 1, 1, 1, 1, -1]]}', "no number of tokens"),
        ('{"crossovers": [["float32", 1, 1, 1, 1, "x"]]}', "no number of tokens"),
        ('{"crossovers": [["float32", 1, 1, 1]]}', "damaged"),
        ('{"crossovers": [["float32", 1, 1, 1, 1, 4, null]]}', "damaged"),
        ('{"crossovers": [["float32", Infinity, 1, 1, 1, 4]]}', "damaged"),
        ('{"crossovers": 3}', "damaged"),
    ],
)
def test_a_useless_file_of_crossovers_is_said_to_be_and_not_used(text: str, why: str, crossing: Path) -> None:
    path = crossovers.save({}, CPU)
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, **json.loads(text)}) if text[0] == "{" and len(text) > 1 else text)
    with pytest.warns(sf.SparseFFNWarning, match=why):
        assert crossovers.table_of("cpu") == {}


@pytest.mark.skipif(cpu.PROBLEM is not None, reason="no CPU core")
def test_the_command_measures_the_cpus_crossovers(
    crossing: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(crossings, "tokens", lambda device: [1, 2])
    sizes = ["--device", "cpu", "--layer", "8", "4", "6", "2", "--dtype", "fp32"]
    assert command.main([*sizes, "--dry-run"]) == 0
    assert not crossing.exists()
    assert command.main(sizes) == 0
    assert "2 tokens: decode" in capsys.readouterr().out
    assert list(crossovers.table_of("cpu")) == [("float32", 8, 4, 8, 2)]
    monkeypatch.setattr(command, "LAYERS", ((16, 4, 6, 2), (32, 4, 6, 2)))
    assert command.main(["--device", "cpu", "--seconds", "1e-9"]) == 3
    assert capsys.readouterr().out.count("not measured: the time was up") == 4  # bf16 and fp32
    assert list(crossovers.table_of("cpu")) == [("float32", 8, 4, 8, 2)]
    for size, why in (("5", "K must be at most E, got K = 5 and E = 4"), ("0", "must be an int > 0, got '0'")):
        with pytest.raises(SystemExit):
            command.main(["--device", "cpu", "--layer", "8", "4", "6", size])
        assert why in capsys.readouterr().err
