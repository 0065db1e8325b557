"""The study of the layers on enwik8: its runs at a tiny size, its plan and its page."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks import machine
from examples.language_model import data, train
from examples.language_model.configs import Config
from examples.language_model.variants import ffn_flops, transformer
from sparse_ffn import MoE
from studies import (
    enwik8,
    headline,
    page,
    paper,
    picture,
    plan,
    reasons,
    results,
    rounded,
    sizes,
    source,
    statistics,
    tables,
    training,
    work,
)
from studies.plan import Run
from studies.variants import VARIANTS

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.exhaustive  # it trains, in processes of its own
TINY = dict(
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_head=16,
    d_ff=64,
    context=16,
    n_experts=8,
    expert_size=8,
    experts_k=2,
    topk_k=16,
    pkm_k=4,
    pkm_heads=2,
    batch_size=4,
    steps=30,
    warmup=3,
    evaluations=3,
    eval_windows=4,
    final_windows=8,
    checkpoints=6,
)
TIMES = ("training_seconds", "training_cpu_seconds", "run_seconds", "run_cpu_seconds", "machine")


def make_tiny() -> dict[str, sizes.Size]:
    return {name: replace(size, config=replace(size.config, **TINY)) for name, size in sizes.SIZES.items()}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 200)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in make_tiny().items():
        monkeypatch.setitem(sizes.SIZES, name, size)


def arguments(text: Path, folder: Path, *more: str) -> list[str]:
    return ["--data", str(text), "--results", str(folder / "results"), "--runs", str(folder / "runs"), *more]


def comparable(record: results.Record) -> results.Record:
    """Without what no two runs share."""
    curve = {key: value for key, value in record["curve"].items() if "seconds" not in key}
    return {**{key: value for key, value in record.items() if key not in TIMES}, "curve": curve}


def load(folder: Path, name: str) -> results.Record:
    record = results.load(folder / "results" / f"{name}.json")
    assert record is not None
    return record


@pytest.fixture(scope="module")
def whole(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an uninterrupted study of two layers: the trials of the learning rate, and a second seed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name, size in make_tiny().items():
            patch.setitem(sizes.SIZES, name, size)
        more = ("--sizes", "S", "--variants", "dense", "sigma", "--seeds", "0", "1")
        assert enwik8.main(arguments(text, folder, *more)) == 0
    return folder


# the layers


@pytest.mark.parametrize("size", ["S", "M"])
def test_layers_have_equal_parameters_and_share_all_else(size: str) -> None:
    config = replace(sizes.SIZES[size].config, n_layers=1)
    dense = transformer(VARIANTS["dense"].make, config, seed=0)
    others = {name: p for name, p in dense.named_parameters() if ".ffn." not in name}
    for name in sizes.SIZES[size].variants:
        model = transformer(VARIANTS[name].make, config, seed=0)
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[other], p) for other, p in others.items())
        share = sum(p.numel() for p in parameters.values()) / sum(p.numel() for p in dense.parameters())
        assert name == "dense-equal-flops" or abs(share - 1) < 0.02, (name, share)


def test_models_have_the_sizes_that_the_study_says() -> None:
    for size, millions, least_bytes in (("S", 0.86, 20e6), ("M", 4.86, 30e6)):
        config = sizes.SIZES[size].config
        model = transformer(VARIANTS["dense"].make, config, seed=0)
        assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.02)
        assert config.steps * config.batch_size * config.context >= least_bytes


def moe(name: str, config: Config) -> MoE:
    layer = VARIANTS[name].make(config)
    assert isinstance(layer, MoE)
    return layer


def test_ablations_change_one_thing_of_sigma_moe() -> None:
    config = sizes.SIZES["S"].config
    torch.manual_seed(0)
    sigma = moe("sigma", config)
    assert (sigma.n_experts, sigma.expert_size, sigma.k, sigma.balance) == (16, 32, 4, ("entropy",))
    assert moe("sigma-8", config).k == 2
    assert moe("sigma-2", config).k == 8
    assert moe("sigma-no-balance", config).balance == ("none",)
    assert moe("sigma-expert-dropout", config).router.expert_dropout == 0.05
    for name, k in (("sigma-k1", 1), ("sigma-k2", 2), ("sigma-k8", 8)):
        layer = moe(name, config)
        assert (layer.k, layer.k * layer.expert_size) == (k, 128)
        assert layer.n_experts * layer.expert_size == pytest.approx(512, abs=layer.expert_size)  # the router grows
    torch.manual_seed(0)
    torch.testing.assert_close(moe("sigma-values-std", config).values, sigma.values * 4)
    switch = moe("switch", config)
    assert (switch.k, switch.expert_size, switch.n_experts, switch.balance) == (1, 128, 4, ("switch",))


def test_the_lower_bound_has_the_arithmetic_of_sigma_moe() -> None:
    config = sizes.SIZES["M"].config
    low, sigma = (transformer(VARIANTS[name].make, config, 0) for name in ("dense-equal-flops", "sigma"))
    assert ffn_flops(low) == pytest.approx(ffn_flops(sigma), rel=0.01)


def test_training_flops_count_linears_and_attention_thrice() -> None:
    config = replace(sizes.SIZES["S"].config, n_layers=1)
    model = transformer(VARIANTS["dense"].make, config, 0)
    linears = 128 * 384 + 128 * 128 + 2 * 128 * 512 + 128 * 256
    attention = sum(2 * 128 * (position + 1) for position in range(256)) / 256  # multiply-adds: scores and values
    assert training.flops_per_byte(model, config) == 3 * 2 * (linears + attention)


# the plan


class Multiplied(TorchDispatchMode):
    """The dtypes of the operands of matrix products inside."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "mm" in func.__name__:
            self.dtypes += [t.dtype for t in tree_leaves(args) if isinstance(t, Tensor)]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("batch", [(), (3,)], ids=["matrices", "batches"])
def test_rounded_operands_are_multiplied_in_fp32_and_rounded_once(batch: tuple[int, ...]) -> None:
    x, w, bias, grad = (torch.randn(*batch, *shape) for shape in ((5, 40), (40, 7), (5, 7), (5, 7)))

    def step(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.bfloat16().to(dtype).requires_grad_() for t in (x, w, bias)]
        y = leaves[0] @ leaves[1] if batch else torch.addmm(leaves[2], *leaves[:2])
        return [y, *torch.autograd.grad(y, leaves[: 2 if batch else 3], grad.bfloat16().to(dtype))]

    with Multiplied() as multiplied, rounded.Rounded():
        found = step(torch.bfloat16)
    assert set(multiplied.dtypes) == {torch.float32}
    for got, expected in zip(found, step(torch.float64), strict=True):
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)


def test_fp32_and_other_devices_are_left_alone() -> None:
    x, meta = torch.randn(5, 5), torch.randn(5, 5, device="meta", dtype=torch.bfloat16)
    with Multiplied() as multiplied, rounded.Rounded():
        assert torch.equal(x @ x, torch.mm(x, x))
        assert (meta @ meta).dtype == torch.bfloat16
    assert multiplied.dtypes == 4 * [torch.float32] + 2 * [torch.bfloat16]


def test_a_step_with_rounded_products_is_a_step_in_bfloat16(tiny: None) -> None:
    x = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))

    def bits(*modes: TorchDispatchMode) -> float:
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            config = replace(sizes.SIZES["S"].config, learning_rate=1e-2)
            learner = training.learner_of(Run("S", "sigma", 0), config, torch.device("cpu"))
            return [train.train_step(learner, x, x, config, 0, step) for step in range(3)][-1]

    assert bits(rounded.Rounded()) == pytest.approx(bits(), abs=1e-2)


def test_a_run_is_of_its_seed_and_of_the_parts_of_the_text(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = [torch.full((400,), byte, dtype=torch.uint8) for byte in range(3)]
    parts[0] = torch.randint(256, (4000,), dtype=torch.uint8)
    seen: list[Tensor] = []

    def step(learner: train.Learner, x: Tensor, y: Tensor, config: Config, seed: int, step: int) -> float:
        seen.append(x)
        learner.seconds.append(1.0)
        learner.cpu_seconds.append(1.0)
        return 1.0

    def ran(variant: str, seed: int) -> tuple[results.Record, list[Tensor]]:
        seen.clear()
        run, corpus = Run("S", variant, seed), data.Corpus("text", "digest", *parts)
        config = run.config(1e-3)
        record = training.train_run(run, config, corpus, torch.device("cpu"), tmp_path / "run.pt", lambda: False)
        assert record is not None
        (tmp_path / "run.pt").unlink()
        return record, list(seen)

    monkeypatch.setattr(train, "train_step", step)
    for module in (train, training):  # the byte that a part consists of
        monkeypatch.setattr(module, "bits_per_byte", lambda learner, part, *windows: float(part[0]))
    record, first = ran("dense", 0)
    assert record["bits_per_byte"] == {"valid": 1.0, "test": 2.0}
    assert record["curve"]["bits_per_byte"] == [1.0, 1.0, 1.0]
    assert all(torch.equal(a, b) for a, b in zip(first, ran("sigma", 0)[1], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, ran("dense", 1)[1], strict=True))


def test_trials_come_first_and_stand_for_the_runs_of_seed_0() -> None:
    queue = plan.queue(["S", "M"])
    trials, rest = queue[:6], queue[6:]
    assert [(run.variant, run.trial) for run in trials] == [
        (variant, rate) for rate in plan.LEARNING_RATES for variant in ("dense", "sigma")
    ]
    assert [run.name for run in rest[:3]] == ["S/topk-16-0", "S/pkm-0", "S/switch-0"]
    wanted = {*plan.runs_of("S"), *plan.runs_of("M")}
    assert len(plan.runs_of("S")) == 20 * 3
    assert len(plan.runs_of("M")) == 5 * 2
    assert set(rest) == wanted - {Run("S", "dense", 0), Run("S", "sigma", 0)}
    assert len(rest) == len(set(rest))


def test_a_plan_is_of_the_sizes_layers_and_seeds_that_were_asked_for() -> None:
    assert [run.name for run in plan.queue(["M"], ["pkm"], [1])][6:] == ["M/pkm-1"]
    assert [run.name for run in plan.queue(["L"], ["dense"])] == ["L/dense-0"]  # with its own learning rate


def fake(run: Run, valid: float, *, test: float = 2.0, diverged: str | None = None) -> results.Record:
    config = run.config(2e-3)
    points = list(range(1, 6))
    facts = ("CPU core", "16-bit instructions", "torch", "sparse-ffn", "commit")
    machine = dict.fromkeys(facts, "x") | {"processor": "a machine"}
    return {
        "size": run.size,
        "variant": run.variant,
        "seed": run.seed,
        "label": VARIANTS[run.variant].label,
        "diverged": diverged,
        "bits_per_byte": None if diverged else {"valid": valid, "test": test},
        "parameters": 1000,
        "ffn_parameters": 500,
        "ffn_flops_per_byte": 100,
        "training_flops_per_byte": 600,
        "training_bytes": config.steps * config.batch_size * config.context,
        "training_seconds": 70.0,
        "training_cpu_seconds": 60.0,
        "run_seconds": 100.0,
        "run_cpu_seconds": 90.0,
        "curve": {
            **{key: points for key in ("bytes", "flops", "seconds", "cpu_seconds")},
            "bits_per_byte": [2.0 + 1 / point for point in points],
        },
        "active_units": [10.0 + run.seed, 20.0 + run.seed] if run.variant == "dense" else [],
        "config": {**config.__dict__},
        "threads": 1,
        "machine": machine,
    }


def test_results_are_on_the_disk_before_their_checkpoint_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "S" / "dense-0.json", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append((os.fstat(file).st_size, path.exists())))
    results.save(path, fake(Run("S", "dense", 0), 2.0))
    assert synced == [(path.stat().st_size, False)]  # all of it, before it has its name


def test_the_learning_rate_is_that_of_the_lowest_sum_over_dense_and_sigma(tmp_path: Path) -> None:
    bits = {1e-3: (2.0, 2.3), 2e-3: (2.1, 2.1), 4e-3: (1.9, None)}
    for rate, values in bits.items():
        for run, valid in zip(plan.trials(rate), values, strict=True):
            assert plan.learning_rate(tmp_path) is None
            record = fake(run, valid or 0.0, diverged=None if valid else "the loss is nan")
            results.save(run.path(tmp_path), record)
    assert plan.learning_rate(tmp_path) == 2e-3
    plan.adopt_trials(tmp_path)
    assert results.load(tmp_path / "S" / "dense-0.json") == results.load(tmp_path / "learning-rate/dense-0.002.json")
    assert plan.Run("S", "pkm", 1).config(2e-3).learning_rate == 2e-3
    assert plan.Run("M", "pkm", 1).config(2e-3).learning_rate == 1e-3  # it is twice as wide
    assert plan.Run("L", "dense", 0).config(2e-3).learning_rate == 2.5e-4


def test_another_text_has_results_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        enwik8.parse(["--data", "mine.txt"])
    assert "--data mine.txt needs a folder of its own: add --results" in capsys.readouterr().err


@pytest.mark.usefixtures("tiny")
def test_plan_says_what_is_left_and_how_long_it_takes(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ("--sizes", "S", "--variants", "dense", "sigma", "pkm", "--seeds", "0", "--plan")
    assert enwik8.main(arguments(text, tmp_path, *chosen)) == 0
    printed = capsys.readouterr().out
    assert printed.count(" min\n") == 7  # six trials and the memory
    assert "0 of 7 runs have finished" in printed
    assert "learning rate: not chosen yet" in printed
    for rate in plan.LEARNING_RATES:
        for run in plan.trials(rate):
            results.save(run.path(tmp_path / "results"), fake(run, valid=2.0))
    (tmp_path / "runs" / "S").mkdir(parents=True)
    torch.save({"step": 15}, tmp_path / "runs" / "S" / "pkm-0.pt")
    assert enwik8.main(arguments(text, tmp_path, *chosen)) == 0
    printed = capsys.readouterr().out
    assert printed.count(" min") == 1
    assert "S/pkm-0" in printed
    assert "50% done" in printed
    assert "6 of 7 runs have finished" in printed
    assert "learning rate: 0.001" in printed


def test_a_plan_that_cannot_be_carried_out_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        enwik8.main(arguments(text, tmp_path, "--sizes", "M", "--variants", "sbase"))
    assert "there is no run of these sizes, layers and seeds" in capsys.readouterr().err
    (tmp_path / "short").write_bytes(b"x" * 1000)
    for name, why in (("nowhere", "no file at"), ("short", "use a longer text")):
        for more in ([], ["--plan"]):
            assert enwik8.main([*arguments(tmp_path / name, tmp_path), *more]) == 1
            assert why in capsys.readouterr().err


# the runs


def test_a_run_leaves_one_small_file_with_all_its_numbers(whole: Path) -> None:
    found = sorted(path.relative_to(whole / "results").as_posix() for path in whole.rglob("*.json"))
    trials = [f"learning-rate/{v}-{rate:g}.json" for v in ("dense", "sigma") for rate in plan.LEARNING_RATES]
    assert found == sorted([*trials, *(f"S/{v}-{seed}.json" for v in ("dense", "sigma") for seed in (0, 1))])
    assert not list((whole / "runs").rglob("*.pt"))
    rate = plan.learning_rate(whole / "results")
    for variant in ("dense", "sigma"):
        assert load(whole, f"S/{variant}-0") == load(whole, f"learning-rate/{variant}-{rate:g}")
        record = load(whole, f"S/{variant}-1")
        assert (whole / "results" / f"S/{variant}-1.json").stat().st_size < 6000
        assert (record["size"], record["variant"], record["seed"]) == ("S", variant, 1)
        assert record["config"]["learning_rate"] == rate
        assert record["curve"]["bytes"] == [640, 1280, 1920]
        flops = record["training_flops_per_byte"]
        assert record["curve"]["flops"] == [640 * flops, 1280 * flops, 1920 * flops]
        assert record["curve"]["bits_per_byte"][-1] < record["curve"]["bits_per_byte"][0]
        assert 0 < record["bits_per_byte"]["test"] < 8
        assert record["training_bytes"] == 1920
        assert {"processor", "torch", "CPU core", "commit"} <= record["machine"].keys()
        assert len(record["routing"]) == (0 if variant == "dense" else 2)
        assert len(record["active_units"]) == (2 if variant == "dense" else 0)
        assert all(0 < n < 64 for n in record["active_units"])


@pytest.mark.usefixtures("tiny")
def test_finished_runs_are_not_run_again(whole: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(work, "train_run")
    more = ("--sizes", "S", "--variants", "dense", "sigma", "--seeds", "0", "1")
    assert enwik8.main(arguments(text, whole, *more)) == 0


KILLED = """
import os, signal, sys
from dataclasses import replace
sys.path.insert(0, {root!r})
from tests.test_studies import make_tiny
from studies import enwik8, results, sizes
from examples.language_model import train
sizes.SIZES.update(make_tiny())

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

step, save = train.train_step, train.torch.save

def in_a_step(*rest):
    return die() if rest[-1] == 17 else step(*rest)

def in_a_checkpoint(content, file):
    save(content, file)
    if content["step"] == 20:
        file.truncate(1000)
        die()

if {when!r} == "step":
    train.train_step = in_a_step
elif {when!r} == "checkpoint":
    train.torch.save = in_a_checkpoint
else:
    results.json.dumps = die
enwik8.main({arguments!r})
"""


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("when", ["step", "checkpoint", "results"])
def test_a_killed_run_goes_on_to_the_same_numbers(
    when: str, whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(whole / "results", tmp_path / "results")
    (tmp_path / "results/S/sigma-1.json").unlink()
    more = arguments(text, tmp_path, "--sizes", "S", "--variants", "sigma", "--seeds", "1")
    script = KILLED.format(root=str(ROOT), when=when, arguments=more)
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == -signal.SIGKILL
    assert not (tmp_path / "results/S/sigma-1.json").exists()

    steps = []
    real = train.train_step

    def spy(*rest: Any) -> float:
        steps.append(rest[-1])
        return real(*rest)

    monkeypatch.setattr(train, "train_step", spy)
    assert enwik8.main(more) == 0
    assert steps == list(range({"step": 15, "checkpoint": 15, "results": 30}[when], 30))
    assert comparable(load(tmp_path, "S/sigma-1")) == comparable(load(whole, "S/sigma-1"))
    assert not list((tmp_path / "runs").rglob("*.p*t"))  # no checkpoint, no part of one


@pytest.mark.usefixtures("tiny")
def test_a_run_that_is_told_to_stop_goes_on_to_the_same_numbers(
    whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder = plan.trials(plan.LEARNING_RATES[0])[0], tmp_path / "results"
    order = work.Order((run,), str(text), folder, tmp_path / "runs")
    for _ in range(3):
        asked = iter([False, False, False, True, True])  # before the run, then after each step
        monkeypatch.setattr(work.Stop, "__call__", lambda self, asked=asked: next(asked))
        work.work(order)
        assert order.left() == [run]
    monkeypatch.undo()
    monkeypatch.setitem(sizes.SIZES, "S", make_tiny()["S"])
    assert torch.load(tmp_path / "runs" / f"{run.name}.pt", weights_only=True)["step"] == 9
    work.work(order)
    assert comparable(load(tmp_path, run.name)) == comparable(load(whole, run.name))


@pytest.mark.usefixtures("tiny")
def test_a_checkpoint_of_other_settings_is_not_gone_on_from(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = plan.trials(plan.LEARNING_RATES[0])[0]
    order = work.Order((run,), str(text), tmp_path / "results", tmp_path / "runs")
    asked = iter([False, False, True, True])
    monkeypatch.setattr(work.Stop, "__call__", lambda self: next(asked))
    work.work(order)
    monkeypatch.undo()
    monkeypatch.setitem(sizes.SIZES, "S", replace(make_tiny()["S"], config=replace(make_tiny()["S"].config, steps=5)))
    work.work(order)
    assert "starts anew, since the checkpoint" in capsys.readouterr().out
    assert load(tmp_path, run.name)["training_bytes"] == 5 * 64


@pytest.mark.usefixtures("tiny")
@pytest.mark.parametrize("fault", ["another source", "another backend", "an empty file"])
def test_a_checkpoint_that_would_not_give_the_same_numbers_is_not_gone_on_from(
    fault: str, whole: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run = plan.trials(plan.LEARNING_RATES[0])[0]
    order = work.Order((run,), str(text), tmp_path / "results", tmp_path / "runs")
    asked = iter([False, False, True, True])
    with monkeypatch.context() as patch:
        patch.setattr(work.Stop, "__call__", lambda self: next(asked))
        if fault == "another source":
            patch.setattr(training, "source", lambda: "0123456789ab")
        if fault == "another backend":
            facts = machine.describe(torch.device("cpu"))
            patch.setattr(machine, "describe", lambda device: facts | {"backend": "cpu: torch"})
        work.work(order)
    if fault == "an empty file":
        (tmp_path / "runs" / f"{run.name}.pt").write_bytes(b"")
    work.work(order)
    assert "starts anew, since the checkpoint" in capsys.readouterr().out
    assert comparable(load(tmp_path, run.name)) == comparable(load(whole, run.name))


def test_the_source_of_a_run_is_all_of_the_kernels_and_of_the_library() -> None:
    files = [path for part in ("csrc", "src/sparse_ffn") for path in (ROOT / part).rglob("*") if path.is_file()]
    unread = {".pyc", ".so", ".typed"}
    assert {path for path in files if path.suffix not in unread} <= set(source.files())


@pytest.mark.usefixtures("tiny")
def test_a_run_that_another_process_has_is_left_to_it(text: Path, tmp_path: Path) -> None:
    runs = tuple(plan.trials(plan.LEARNING_RATES[0]))
    order = work.Order(runs, str(text), tmp_path / "results", tmp_path / "runs")
    with work.lock(tmp_path / "runs" / f"{runs[0].name}.lock") as mine:
        assert mine
        work.work(order)
    assert order.left() == [runs[0]]


@pytest.mark.usefixtures("tiny")
def test_a_run_that_diverges_is_recorded_and_not_repeated(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(learner: train.Learner, *rest: Any) -> float:
        raise train.TrainingError("the loss of dense is nan at step 0")

    monkeypatch.setattr(train, "train_step", diverging)
    run = plan.trials(plan.LEARNING_RATES[0])[0]
    order = work.Order((run,), str(text), tmp_path / "results", tmp_path / "runs")
    work.work(order)
    record = load(tmp_path, run.name)
    assert record["diverged"] == "the loss of dense is nan at step 0"
    assert record["bits_per_byte"] is None
    assert order.left() == []


@pytest.mark.usefixtures("tiny")
def test_a_model_that_its_last_step_ruined_has_diverged(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = train.train_step

    def ruining(learner: train.Learner, *rest: Any) -> float:
        bits = real(learner, *rest)
        if rest[-1] == 29:
            with torch.no_grad():
                learner.model.head.weight.fill_(float("nan"))
        return bits

    monkeypatch.setattr(train, "train_step", ruining)
    run = plan.trials(plan.LEARNING_RATES[0])[0]
    work.work(work.Order((run,), str(text), tmp_path / "results", tmp_path / "runs"))
    record = load(tmp_path, run.name)
    assert record["diverged"] == "the loss of dense is not finite after the last step"
    assert record["bits_per_byte"] is None
    assert record["curve"]["bits_per_byte"][-1] is None


def test_two_jobs_take_a_run_each_and_a_signal_stops_both(text: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "studies.enwik8", *arguments(text, tmp_path, "--sizes", "S", "--jobs", "2")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while len(list(tmp_path.rglob("*.lock"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert "64 of 64 runs are left" in printed
    checkpoints = sorted(path.name for path in tmp_path.rglob("*.pt"))
    assert checkpoints == ["dense-0.001.pt", "sigma-0.001.pt"]


def test_a_worker_whose_parent_is_gone_stops() -> None:
    assert not work.Stop(None)()
    assert not work.Stop(None, parent=os.getppid())()
    assert work.Stop(None, parent=os.getppid() + 1)()
    assert work.Stop(deadline=time.time() - 1)()


def test_a_worker_whose_parent_went_while_it_imported_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    for pid, gone in ((os.getppid(), False), (os.getppid() + 1, True)):
        monkeypatch.setattr(multiprocessing, "parent_process", lambda pid=pid: SimpleNamespace(pid=pid))
        assert work.Stop(None)() == gone


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_papers_size_is_for_gpus(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        enwik8.main(["--sizes", "L"])
    assert "--sizes L would take months on a CPU: add --device cuda" in capsys.readouterr().err


# the page


def test_differences_are_paired_by_seed() -> None:
    bits = {"a": {0: 2.0, 1: 2.2, 2: 2.5, 3: 2.1, 4: 2.3, 7: 9.0}, "b": {0: 2.1, 1: 2.3, 2: 2.5, 3: 2.1, 4: 2.4}}
    found = statistics.paired(bits["a"], bits["b"], statistics.noise(bits))
    assert found is not None
    assert found.n == 5
    assert found.mean == pytest.approx(-0.06)
    assert found.error == pytest.approx(torch.tensor([-0.1, -0.1, 0.0, 0.0, -0.1]).std().item() / 5**0.5)
    assert str(found) == "-0.0600 ± 0.0245"
    assert statistics.paired({0: 2.0}, {1: 2.0}, None) is None


def test_chance_is_known_from_all_layers_together() -> None:
    """An error with as many degrees of freedom as there are, whatever the layers and the seeds are worth."""
    generator = torch.Generator().manual_seed(0)
    values = 0.01 * torch.randn(40, 25, generator=generator, dtype=torch.float64)
    values += torch.randn(40, 1, generator=generator) + torch.randn(1, 25, generator=generator)
    bits = {str(i): dict(enumerate(row)) for i, row in enumerate(values.tolist())}
    found = statistics.noise(bits)
    assert found is not None
    assert found.freedom == 39 * 24
    assert found.deviation == pytest.approx(0.01, rel=0.1)
    pairs = [(a, b) for a in range(40) for b in range(a)]
    variance = sum((values[a] - values[b]).var().item() for a, b in pairs) / len(pairs)
    assert found.deviation == pytest.approx((variance / 2) ** 0.5)
    difference = statistics.paired(bits["0"], bits["1"], found)
    assert difference is not None
    assert difference.error == pytest.approx((variance / 25) ** 0.5)


def test_runs_that_share_nothing_say_nothing_of_chance() -> None:
    assert statistics.noise({}) is None
    assert statistics.noise({"a": {0: 2.0, 1: 2.1}, "b": {0: 2.0}}) is None
    assert statistics.noise({"a": {0: 2.0, 1: 2.1}, "b": {2: 2.0, 3: 2.5}}) is None
    shared = {seed: 2.0 + seed / 10 for seed in range(5)}
    found = statistics.noise({"a": shared, "b": {seed: of + 0.5 for seed, of in shared.items()} | {5: 3.0}})
    assert found == statistics.Noise(pytest.approx(0.0, abs=1e-9), 4)


def test_of_few_degrees_of_freedom_no_error_is_told() -> None:
    """Four seeds of two layers have three."""
    bits = {"a": {seed: 2.0 for seed in range(4)}, "b": {seed: 2.1 for seed in range(4)}}
    assert statistics.noise(bits) is None
    found = statistics.paired(bits["b"], bits["a"], None)
    assert found is not None
    assert (str(found), found.verdict) == ("+0.1000", "too few runs")


@pytest.mark.parametrize(("freedom", "misses"), [(1, 0.2952), (2, 0.1835), (4, 0.1161), (10, 0.0734), (38, 0.0527)])
def test_two_errors_of_few_degrees_of_freedom_miss_as_student_says(freedom: int, misses: float) -> None:
    assert statistics.once_in(freedom) == round(1 / misses)


@pytest.mark.parametrize(
    ("mean", "error", "verdict"),
    [(-0.5, 0.1, "lower"), (0.5, 0.1, "higher"), (0.2, 0.1, "none"), (-0.19, 0.1, "none"), (-0.5, None, "one seed")],
)
def test_a_difference_within_two_errors_is_none(mean: float, error: float | None, verdict: str) -> None:
    assert statistics.Difference(mean, error, 3 if error else 1).verdict == verdict


def write_page(folder: Path) -> str:
    readme = folder / "README.md"
    readme.write_text(f"before\n{headline.BEGIN}\noutdated\n{headline.END}\nafter\n")
    page.main(["--results", str(folder / "results"), "--docs", str(folder), "--readme", str(readme)])
    return (folder / "evidence.md").read_text()


def test_page_without_results_says_so(tmp_path: Path) -> None:
    written = write_page(tmp_path)
    assert "Size S: none of its 60 runs has finished" in written
    assert "Size M: none of its 10 runs has finished" in written
    assert "Size L, the paper's model, needs a GPU" in written
    assert "|" not in written.split("## How to reproduce")[0]
    assert not (tmp_path / "images").exists()
    assert "have not finished" in (tmp_path / "README.md").read_text()


def test_page_says_why_runs_were_given_up(tmp_path: Path) -> None:
    for variant, bits in (("dense", [2.5]), ("sigma", [2.6, 2.75])):
        curve = {"bytes": [1_500_000, 3_000_000][: len(bits)], "bits_per_byte": bits}
        record = {"size": "M", "variant": variant, "seed": 0, "learning_rate": 0.004, "curve": curve}
        results.save(tmp_path / "results" / results.STOPPED / f"{variant}-0.json", record)
    written = write_page(tmp_path)
    assert "Size M began with 0.004 too" in written
    assert row(written, "1.5 MB")[1:] == ["2.5000", "2.6000"]
    assert row(written, "3.0 MB")[1:] == ["", "2.7500"]


def row(written: str, label: str) -> list[str]:
    line = next(line for line in written.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_page_of_some_results(tmp_path: Path) -> None:
    dense = {0: 2.00, 1: 2.02, 2: 2.01}
    offsets = {"sigma": (-0.02, -0.01, -0.02), "topk-16": (0.01, -0.01, 0.0), "pkm": (0.1,), "sigma-k1": (0.0, 0.02)}
    offsets["softmax-after"] = (0.2, 0.2)
    for seed, bits in dense.items():
        run = Run("S", "dense", seed)
        results.save(run.path(tmp_path / "results"), fake(run, 2.0, test=bits))
    for variant, values in offsets.items():
        for seed, offset in enumerate(values):
            run = Run("S", variant, seed)
            results.save(run.path(tmp_path / "results"), fake(run, 2.0, test=dense[seed] + offset))
    for name in ("switch-0", "softmax-after-2"):
        variant, _, seed = name.rpartition("-")
        run = Run("S", variant, int(seed))
        results.save(run.path(tmp_path / "results"), fake(run, 0.0, diverged=f"the loss of {variant} is nan at step 7"))

    written = write_page(tmp_path)
    assert "Size S: **44 of 60 runs missing**" in written
    assert "ProductKeyMemory, ReLU (seed 1, 2)" in written
    assert row(written, "SigmaMoE, 25%")[4:] == ["1.9933", "-0.0167 ± 0.0071", "lower", "3", "1.08", "11.71"]
    assert row(written, "TopKFFN, k = d_ff/16")[5:7] == ["+0.0000 ± 0.0071", "none"]
    assert row(written, "ProductKeyMemory, ReLU")[5:8] == ["+0.1000", "one seed", "1"]
    assert row(written, "SwitchMoE")[4:8] == ["diverged", "–", "diverged", "1, 1 diverged"]
    assert row(written, "SoftmaxMoE, renormalised")[5:8] == ["+0.2000 ± 0.0087", "diverged", "3, 1 diverged"]
    assert row(written, "1 expert, 4 x the size")[5] == "+0.0250 ± 0.0087"  # from SigmaMoE, not from dense
    ranks = written.split("1 the lowest")[1].split("in the course of training")[0]
    assert [line.split("|")[1].strip() for line in ranks.splitlines() if line.startswith("|")][2:] == [
        "SigmaMoE, 25%",
        "dense, ReLU",
        "TopKFFN, k = d_ff/16",
        "ProductKeyMemory, ReLU",
        "SoftmaxMoE, renormalised",
    ]
    assert row(ranks, "SigmaMoE, 25%") == ["SigmaMoE, 25%", "1 to 2", "1 to 4", "1 to 3"]
    assert "from dense of SoftmaxMoE, renormalised (higher here, none there).\n" in ranks
    assert "known from 6 degrees of freedom; without the runs of any one\nlayer it would be" in written
    assert (
        "**Of 2 layers with two seeds or more, above dense: none; not told from dense: TopKFFN, k = d_ff/16; "
        "below dense: SigmaMoE, 25%. Some runs diverged of SwitchMoE / SoftmaxMoE, renormalised.**" in written
    )
    assert "from dense, with its sign, rose by more than 2 standard errors for 0 of 3 layers and fell as" in written
    assert "Some runs diverged of SoftmaxMoE, renormalised: what is told of them here is of their other runs." in ranks
    assert "With one seed each it cannot be told" not in written
    assert (
        "dense FFN uses for a byte, from the first layer to the last: 11, 21 (3 seeds). SigmaMoE computes 128"
        in written
    )
    assert "| a machine |" in written
    for name in ("evidence-bytes.png", "evidence-costs.png"):
        assert f"images/{name}" in written
        assert (tmp_path / "images" / name).read_bytes().startswith(b"\x89PNG")


def test_a_difference_says_of_how_many_seeds_it_is_where_not_of_all() -> None:
    runs = [Run("S", "dense", 0), Run("S", "pkm", 0), Run("S", "pkm", 1)]
    table = tables.comparison([fake(run, 2.0, test=2.0 + run.seed) for run in runs], ["pkm"], "dense", {})
    assert row(table, "ProductKeyMemory, ReLU")[4:8] == ["2.5000", "+0.0000", "one seed", "2, 1 of them paired"]


def test_the_course_of_differences_is_read_off_the_curves() -> None:
    runs = [Run("S", name, seed) for name in ("dense", "pkm", "noisy") for seed in (0, 1, 2)]
    records = [fake(run, 2.0) for run in runs]
    for record in records:
        points = 8 if record["variant"] == "pkm" else 4
        record["curve"]["bytes"] = [10 * (i + 1) * 4 // points for i in range(points)]
        start = 3.0 + record["seed"] + (0.5 if record["variant"] == "pkm" else 0.0)
        record["curve"]["bits_per_byte"] = [start - i / points for i in range(points)]
    found = row(tables.course(records, ["dense", "pkm"], "dense"), "ProductKeyMemory, ReLU")
    assert found[1:] == [f"{0.5 - 0.125:+.4f} ± 0.0000"] * 4
    assert tables.course(records[:3], ["dense", "pkm"], "dense") == ""


def test_a_difference_that_comes_nearer_to_0_from_below_rises() -> None:
    runs = [Run("S", name, seed) for name in ("dense", "pkm", "noisy") for seed in (0, 1, 2)]
    records = [fake(run, 2.0) for run in runs]
    for record in records:
        if record["variant"] == "pkm":
            points = record["curve"]["bits_per_byte"]
            record["curve"]["bits_per_byte"] = [bits - 0.5 / (i + 1) for i, bits in enumerate(points)]
    said = [*tables.verdicts(records, ["pkm"], "dense"), reasons.reasons({"S": records})]
    rose = re.compile(r"with its sign, rose by more than 2 standard errors for 1 of [12] layers and fell as much for 0")
    assert all(rose.search(" ".join(text.split())) for text in said[1:])
    assert not any("grew" in text for text in said)


@pytest.mark.parametrize(
    ("mean", "error", "number", "other"),
    [
        (0.03, 0.005, 1.08, True),  # none there, and at least 0.02 here
        (0.03, 0.005, 1.10, False),  # higher there too
        (0.0035, 0.001, 1.08, False),  # 1.08 may be 1.0835
        (-0.03, 0.005, 1.10, True),
        (0.0, 0.002, 1.10, True),  # none here: less than 0.004, and at least 0.01 there
        (0.0, 0.02, 1.10, False),
        (0.04, 0.005, 1.09, True),  # there 0.02 at most
        (0.018, 0.005, 1.09, False),
    ],
)
def test_a_result_is_other_than_the_papers_only_if_no_rounding_makes_them_one(
    mean: float, error: float, number: float, other: bool
) -> None:
    found = statistics.Difference(mean, error, 3)
    words = found.verdict, paper.direction(number, 1.08, "e8")
    assert (words[0] != words[1] and paper.excludes(number, 1.08, found.interval)) == other


def test_times_are_of_machines_that_both_layers_ran_on_and_that_compute_in_bfloat16() -> None:
    def ran(variant: str, seed: int, processor: str, has: str, seconds: float) -> results.Record:
        record = fake(Run("S", variant, seed), 2.0) | {"training_cpu_seconds": seconds}
        record["machine"] = record["machine"] | {"processor": processor, "16-bit instructions": has}
        return record

    records = [
        ran("dense", 0, "new", "avx512_bf16", 100.0),
        ran("dense", 1, "old", "none", 900.0),
        ran("dense", 2, "newest", "avx512_bf16, amx_tile", 50.0),
        ran("sigma", 0, "old", "none", 90.0),
        ran("sigma", 1, "new", "avx512_bf16", 150.0),
        ran("pkm", 1, "other", "avx512_bf16", 10.0),
    ]
    table = tables.comparison(records, ["dense", "sigma", "pkm"], "dense", {})
    assert [row(table, VARIANTS[name].label)[3] for name in ("dense", "sigma", "pkm")] == ["1.0x", "1.5x", "–"]
    assert "without instructions for bfloat16 are left out" in table


def test_curves_are_of_the_seeds_that_all_layers_have() -> None:
    runs = [("dense", 0), ("dense", 1), ("sigma", 0), ("sigma", 1), ("pkm", 0), ("sigma-k1", 2), ("noisy", 7)]
    shared = picture.of_shared_seeds([fake(Run("S", *run), 2.0) for run in runs])
    assert {name: [r["seed"] for r in of] for name, of in shared.items()} == {"dense": [0], "sigma": [0], "pkm": [0]}
    assert picture.of_shared_seeds([fake(Run("S", "pkm", 0), 2.0, diverged="the loss is nan")]) == {}


def test_the_page_says_which_size_is_not_drawn() -> None:
    lost = (Run("M", "sigma", 0), Run("M", "pkm", 1))
    runs = {size: plan.runs_of(size) for size in ("S", "M")}
    records = {
        size: [fake(run, 2.0, diverged="the loss is nan" if run in lost else None) for run in of]
        for size, of in runs.items()
    }
    without = "Size M is not drawn: no seed has whole runs of all its layers."
    assert next(page.pictures(records)).endswith(f"that all layers of a picture have. {without}\n")
    assert list(page.pictures({"M": records["M"]})) == [f"{without}\n"]


def test_the_page_tells_all_learning_rates_of_a_size() -> None:
    records = [fake(Run("M", "dense", seed), 2.0) for seed in (0, 1)]
    records[1]["config"]["learning_rate"] = 4e-3
    assert row(page.trained({"M": records}), "M")[7] == "0.001 / 0.004"


def test_the_headline_tells_of_seeds_that_diverged() -> None:
    runs = [Run("M", variant, seed) for variant in sizes.CORE for seed in (0, 1)]
    records = [fake(run, 2.0, test=2.0 + 0.1 * (run.variant == "pkm")) for run in runs]
    text = headline.headline({"S": [], "M": records})
    assert row(text, "M: 0.0M parameters, 30 MB of text, 2 seeds")[3] == "+0.1000 ± 0.0000"
    assert row(text, "the paper: 41M parameters, 1.6 GB, one run")[1:] == ["+0.00", "-0.01", "+0.03", "+0.02", ""]
    assert "once in 9 times at size M (4 degrees of freedom); the layers of a size" in text.replace("\n", " ")
    assert "with it +0.00." in text
    more = {"dense": 2.0, "sigma": 2.03, "topk-16": 1.9, "pkm": 2.0, "switch": 2.1, headline.BOUND: 2.12}
    small = [fake(Run("S", name, seed), 2.0, test=test) for name, test in more.items() for seed in (0, 1)]
    assert "not finished" in headline.headline({"M": records[:-1]})
    assert "not finished" in headline.headline({"M": records[1:]})  # dense has one
    lost = [fake(run, 2.0, diverged="the loss is nan") for run in runs[-1:]]
    assert row(headline.headline({"M": records[:-1] + lost}), "M: 0.0M parameters, 30 MB of text, 1/2 seeds")[4] == (
        "+0.0000, 1 diverged"
    )
    assert "with runs that diverged: SwitchMoE." in headline.headline({"M": records[:-1] + lost}).replace("\n", " ")
    assert "Size M has half of it, untuned" in text.replace("\n", " ")
    assert "Size M" not in headline.headline({"S": small})


@pytest.mark.parametrize(
    ("diverged", "ran", "cells", "said"),
    [
        (
            [],
            "2 seeds",
            ["-0.1000 ± 0.0000", "+0.0000 ± 0.0000", "+0.1000 ± 0.0000", "+0.0000 ± 0.0000"],
            "above dense by more than 2 standard errors: ProductKeyMemory, ReLU; within 2 standard errors of dense: "
            "TopKFFN, k = d_ff/16 / SwitchMoE; below dense by more than 2 standard errors: SigmaMoE, 25%.",
        ),
        (
            ["sigma-1"],
            "1/2 seeds",
            ["-0.1000, 1 diverged", "+0.0000", "+0.1000", "+0.0000"],
            "of too few runs to call: TopKFFN, k = d_ff/16 / ProductKeyMemory, ReLU / SwitchMoE; with runs that "
            "diverged: SigmaMoE, 25%.",
        ),
        (
            ["dense-1"],
            "1 seed, 1 of dense diverged",
            ["-0.1000", "+0.0000", "+0.1000", "+0.0000"],
            "of too few runs to call: all four sparse layers.",
        ),
        (
            ["dense-0", "dense-1"],
            "2 of dense diverged",
            ["–"] * 4,
            "of too few runs to call: all four sparse layers.",
        ),
    ],
)
def test_the_headline_has_each_layer_in_one_place_however_the_runs_end(
    diverged: list[str], ran: str, cells: list[str], said: str
) -> None:
    offsets = {"sigma": -0.1, "pkm": 0.1}
    records = [
        fake(
            run,
            2.0,
            test=2.0 + offsets.get(run.variant, 0.0),
            diverged="the loss is nan" if f"{run.variant}-{run.seed}" in diverged else None,
        )
        for run in plan.runs_of("M")
    ]
    text = headline.headline({"M": records})
    assert row(text, f"M: 0.0M parameters, 30 MB of text, {ran}")[1:5] == cells
    assert f"Size M, {said}" in text.replace("\n", " ")


def test_a_layer_that_makes_most_of_the_chance_is_named() -> None:
    second = {"sigma": 0.01, "switch": 0.2}  # what the second seed of a layer is worth beyond that of others
    records = [fake(run, 2.0, test=2.0 + run.seed * second.get(run.variant, 0.0)) for run in plan.runs_of("M")]
    assert "would be 0.0035 (SwitchMoE) to " in " ".join(tables.spread(records).split())
    said = "Without SwitchMoE's runs size M's errors would be 6% of what they are."
    assert said in " ".join(headline.headline({"M": records}).split())
    few = [fake(Run("S", name, seed), 2.0) for name in ("dense", "sigma") for seed in range(5)]
    assert tables.spread(few).endswith("known from 4 degrees of freedom.")  # and nothing is left without either


def test_the_units_that_a_token_uses_are_those_of_the_layers() -> None:
    config = sizes.SIZES["S"].config
    for name, (share, size) in tables.CHOSEN.items():
        layer = VARIANTS[name].make(config)
        if isinstance(layer, MoE):
            assert (layer.k * layer.expert_size, layer.expert_size) == (share * 512, size * 32)
        else:
            assert (layer.k, size) == (share * 512, 0)
    runs = [Run("S", name, seed) for name in ("dense", "topk-4", "noisy", "sigma-2") for seed in (0, 1, 2)]
    records = [fake(run, 2.0, test=2.0 + 0.1 * (run.variant == "sigma-2")) for run in runs]
    table = tables.chosen(records)
    assert row(table, "1") == ["1", "128", "+0.0000 ± 0.0000", "none", "3"]
    assert row(table, "32") == ["32", "256", "+0.1000 ± 0.0000", "higher", "3"]
    assert tables.chosen(records[:4]) == ""
    records[-1] = fake(runs[-1], 2.0, diverged="the loss is nan")
    assert row(tables.chosen(records), "32") == ["32", "256", "+0.1000 ± 0.0000", "diverged", "2"]


def test_the_lowest_change_is_that_of_the_lowest_difference_whatever_seeds_it_has() -> None:
    """The third seed is easier, and the change that is lower on the others diverged there."""
    records = [fake(run, 2.0, test=1.5 if run.seed == 2 else 2.0) for run in plan.runs_of("S")]
    for i, run in enumerate(plan.runs_of("S")):
        if run.variant == "sigma-2":
            records[i] = fake(run, 2.0, test=1.9, diverged="the loss is nan" if run.seed == 2 else None)
    flat = " ".join(reasons.reasons({"S": records}).split())
    assert "The lowest of these 7 changes of SigmaMoE, found by looking at all, and so by chance too low:" in flat
    assert "“8 experts of 16, 50%”, -0.1000 ± 0.0000, called diverged, from dense; -0.1000" in flat
    assert "Some runs diverged of 8 experts of 16, 50%: what is told of them here is of their other runs." in flat


def test_sizes_without_chance_are_compared_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reasons, "noise", lambda bits: statistics.Noise(0.0, 4))
    records = {size: [fake(run, 2.0) for run in plan.runs_of(size)] for size in ("S", "M")}
    assert "SigmaMoE, 25% +0.0000 ± 0.0000 at S, +0.0000 ± 0.0000 at M" in " ".join(reasons.reasons(records).split())


def test_layers_of_unlike_seeds_stand_in_the_order_of_their_differences() -> None:
    """The second seed is harder, and has dense only."""
    bits = {("dense", 0): 2.0, ("dense", 1): 2.4, ("sigma", 0): 2.1, ("pkm", 0): 2.05, ("topk-4", 0): 1.9}
    records = [fake(Run("S", *of), 2.0, test=test) for of, test in bits.items()]
    names = ["sigma", "dense", "pkm", "topk-4"]
    found = "\n".join(tables.beside_the_paper(records, names, "dense", paper.LAYERS))
    labels = [VARIANTS[name].label for name in ("topk-4", "dense", "pkm", "sigma")]
    assert sorted(labels, key=found.index) == labels


def test_page_of_complete_sizes_and_trials(tmp_path: Path) -> None:
    for rate in plan.LEARNING_RATES:
        for run in plan.trials(rate):
            record = fake(run, valid=2.0 + 10 * rate)
            record["config"]["learning_rate"] = rate
            results.save(run.path(tmp_path / "results"), record)
    for size in ("S", "M"):
        for run in plan.runs_of(size):
            results.save(run.path(tmp_path / "results"), fake(run, valid=2.0))
    written = write_page(tmp_path)
    assert "Size S is complete: 60 runs." in written
    assert "Size M is complete: 10 runs." in written
    assert "missing" not in written
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith(f"before\n{headline.BEGIN}\nModels trained here")
    assert readme.endswith(f"{headline.END}\nafter\n")
    assert "outdated" not in readme
    assert row(readme, "S: 0.0M parameters, 20 MB of text, 3 seeds")[1:] == ["+0.0000 ± 0.0000"] * 5
    assert row(readme, "M: 0.0M parameters, 30 MB of text, 2 seeds")[1:] == [*["+0.0000 ± 0.0000"] * 4, ""]
    assert row(written, "0.002") == ["0.002", "2.0200", "2.0200"]
    assert "The lowest sum is that of 0.001; dense, ReLU alone would have 0.001, SigmaMoE, 25% alone would" in written
    flat = " ".join(written.split())
    assert "The next sum is 0.0200 above, where chance alone" in flat
    assert "It is the lowest of the three that were tried: a lower one may be better still." in flat
    assert "degrees of freedom; without the runs of any one layer it would be" in flat.split("## Size M")[0]
    assert "known from 4 degrees of freedom; without the runs of any one" in flat.split("## Size M")[1]
    assert "The models of sizes S and M are far smaller" in flat
    assert written.count("## Why results may be other than the paper's") == 1
    assert "with 64, 128 and 256 units for a token: +0.0000, +0.0000, +0.0000; of TopKFFN with 32 and 128" in flat
    assert "From SigmaMoE, without that loss: +0.0000 ± 0.0000, called none" in flat
    assert "Differences from dense: SigmaMoE, 25% +0.0000 ± 0.0000 at S, +0.0000 ± 0.0000 at M" in flat


def test_page_of_real_runs(whole: Path, tmp_path: Path) -> None:
    (tmp_path / "results").symlink_to(whole / "results")
    written = write_page(tmp_path)
    sigma, dense = (
        [load(whole, f"S/{v}-{seed}")["bits_per_byte"]["test"] for seed in (0, 1)] for v in ("sigma", "dense")
    )
    assert row(written, "SigmaMoE, 25%")[4] == f"{sum(sigma) / 2:.4f}"
    difference = [a - b for a, b in zip(sigma, dense, strict=True)]
    assert row(written, "SigmaMoE, 25%")[5:7] == [f"{sum(difference) / 2:+.4f}", "too few runs"]


def test_the_committed_page_and_headline_are_what_the_committed_runs_give(tmp_path: Path) -> None:
    readme = Path(shutil.copy(ROOT / "README.md", tmp_path))
    page.main(["--docs", str(tmp_path), "--readme", str(readme)])
    assert readme.read_text() == (ROOT / "README.md").read_text()
    assert (tmp_path / "evidence.md").read_text() == (ROOT / "docs" / "evidence.md").read_text()


def test_of_runs_that_were_made_again_the_first_are_in_no_table(tmp_path: Path) -> None:
    for variant, test in (("dense", 2.0), ("sigma", 2.1)):
        for seed in (0, 1):
            run = Run("S", variant, seed)
            results.save(run.path(tmp_path / "results"), fake(run, 2.0, test=test))
            again = fake(run, 2.0, test=test + (0.01 if seed else 0.03))
            results.save(run.path(tmp_path / "results" / results.EMULATED), again)
    written = write_page(tmp_path)
    assert row(written, "SigmaMoE, 25%")[4] == "2.1000"
    flat = " ".join(written.split())
    assert "4 other runs of such a processor were made again" in flat
    assert "the first had +0.0200 ± 0.0058 test bits per byte more, and validation bits that were up to 0.0000" in flat
    assert "Of the runs in the tables" not in flat


def test_the_page_names_the_runs_of_processors_that_round(tmp_path: Path) -> None:
    run = Run("S", "dense", 1)
    record = fake(run, 2.0)
    record["machine"] = record["machine"] | {"16-bit instructions": "none"}
    results.save(run.path(tmp_path / "results"), record)
    assert (
        "Of the runs in the tables, 1 are of a processor that multiplies rounded operands in fp32: dense, ReLU ("
        in (" ".join(write_page(tmp_path).split()))
    )


def test_one_seed_each_tells_nothing() -> None:
    records = [fake(Run("S", name, 0), 2.0, test=test) for name, test in (("dense", 2.0), ("sigma", 2.9))]
    found = "\n".join(tables.beside_the_paper(records, ["dense", "sigma"], "dense", paper.LAYERS))
    assert "With one seed each it cannot be told whether they are other than" in found
    assert list(tables.verdicts(records, ["sigma"], "dense")) == []


@pytest.mark.parametrize("n", [7, 8, 9])
def test_of_few_runs_of_two_seeds_nothing_is_told_either(n: int) -> None:
    records = [fake(run, 2.0) for run in plan.runs_of("M")[:n]]
    found = "\n".join(tables.beside_the_paper(records, sizes.CORE, "dense", paper.LAYERS))
    assert "Of so few runs it cannot be told whether they are other than in" in found
    assert "theirs: here those between which the difference is called neither higher nor lower" in found


def test_committed_results_are_whole_and_of_the_plan() -> None:
    folders, chosen = (results.RESULTS, results.RESULTS / results.EMULATED), plan.learning_rate(results.RESULTS)
    known = {run.path(folder): run for folder in folders for size in sizes.SIZES for run in plan.runs_of(size)}
    known |= {run.path(results.RESULTS): run for rate in plan.LEARNING_RATES for run in plan.trials(rate)}
    for path in results.RESULTS.rglob("*"):
        if path.is_file() and path.parent.name != results.STOPPED:
            assert path in known
            record = json.loads(path.read_text())
            if results.EMULATED in path.parts:
                assert results.emulated(record)
                assert (results.RESULTS / path.relative_to(results.RESULTS / results.EMULATED)).exists()
            assert path.name.startswith(f"{record['variant']}-")
            config = record["config"]
            assert config == asdict(known[path].config(chosen))
            whole_run = config["steps"] * config["batch_size"] * config["context"]
            assert record["training_bytes"] == whole_run or record["diverged"]
