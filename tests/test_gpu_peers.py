"""The adapters of libraries that need a GPU, against stand-ins that have their signatures and layouts of weights."""

from __future__ import annotations

import ast
import enum
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import sparse_ffn as sf
from benchmarks.contenders import cvmm, gpu_peers
from benchmarks.contenders.moe import ExpertsAlone, Problem, moe_case, sonic_bytes
from benchmarks.measuring.check import errors
from benchmarks.measuring.contender import Case, Contender, Experts, NotInstalled
from benchmarks.measuring.memory import saved_for_backward
from benchmarks.measuring.run import run_case
from benchmarks.shapes import MoEShape

TINY, CPU = MoEShape(24, 16, 4, 8, 2), torch.device("cpu")

# T tokens, D d_model, E experts, G units, K selected


def mixture(x_TD: Tensor, index_TK: Tensor, gate_TK: Tensor, experts: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Each token through its experts, one at a time."""
    rows = []
    for x, index, gate in zip(x_TD, index_TK.tolist(), gate_TK, strict=True):
        rows.append(torch.stack([experts(x, e) * g for e, g in zip(index, gate, strict=True)]).sum(0))
    return torch.stack(rows)


class Linear(nn.Module):
    """scattermoe's ParallelExperts, the weight only."""

    def __init__(self, n_experts: int, n_in: int, n_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(n_experts, n_out, n_in))


class ScatterMLP(nn.Module):
    halves = 1

    def __init__(self, input_size: int, hidden_size: int, num_experts: int, top_k: int, bias: bool = False,
                 activation: Any = None) -> None:  # fmt: skip
        super().__init__()
        self.experts = Linear(num_experts, input_size, self.halves * hidden_size)
        self.output_experts = Linear(num_experts, hidden_size, input_size)
        self.activation = activation

    def hidden(self, x: Tensor, e: int) -> Tensor:
        y: Tensor = self.activation(self.experts.weight[e] @ x)
        return y

    def forward(self, x: Tensor, expert_p: Tensor, expert_idxs: Tensor) -> Tensor:
        down = self.output_experts.weight
        return mixture(x, expert_idxs, expert_p, lambda row, e: down[e] @ self.hidden(row, e))


class ScatterGLU(ScatterMLP):
    halves = 2

    def hidden(self, x: Tensor, e: int) -> Tensor:
        up, gates = (self.experts.weight[e] @ x).chunk(2)
        y: Tensor = self.activation(gates) * up
        return y


def flatten_sort_count(expert_idxs: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    experts, order = torch.sort(expert_idxs.flatten())
    return experts, order, torch.bincount(experts, minlength=num_experts).cumsum(-1)


def parallel_linear(
    inputs: Tensor, expert_weights: Tensor, k: int, sorted_expert_idxs: Tensor, sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor, expert_biases: Tensor | None = None, gates: Tensor | None = None,
    grouped_in: bool = False, grouped_out: bool = False,
) -> Tensor:  # fmt: skip
    assert not grouped_in
    assert not grouped_out
    experts = sorted_expert_idxs[sorted_scattered_idxs.argsort()]
    y = torch.einsum("sm,sml->sl", inputs.repeat_interleave(k, 0), expert_weights[experts])
    return y if gates is None else (gates.unsqueeze(1) @ y.view(*gates.shape, -1)).squeeze(1)


class ActivationType(enum.Enum):
    SWIGLU = "swiglu"
    RELU = "relu"


def moe_general_routing_inputs(
    x: Tensor, router_scores: Tensor, token_indices: Tensor, expert_indices: Tensor, w1: Tensor, b1: Tensor | None,
    w2: Tensor, b2: Tensor | None, E: int, stream_id: int, activation_type: ActivationType,
    is_inference_mode_enabled: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """w1 is [2G or G, D, E] with the rows of gate and up in turn, w2 is [D, G, E]; tokens ascend."""
    assert b1 is None
    assert b2 is None
    assert token_indices.dtype == expert_indices.dtype == torch.int32
    assert (token_indices.diff() >= 0).all()
    K = len(router_scores) // len(x)

    def expert(row: Tensor, e: int) -> Tensor:
        up = w1[:, :, e] @ row
        hidden = F.silu(up[::2]) * up[1::2] if activation_type is ActivationType.SWIGLU else F.relu(up)
        return w2[:, :, e] @ hidden

    y = mixture(x, expert_indices.view(-1, K), router_scores.view(-1, K).to(x.dtype), expert)
    return y, torch.bincount(expert_indices, minlength=E)


class LigerFusedMoEFunction:
    @staticmethod
    def apply(x: Tensor, gate_up_proj: Tensor, down_proj: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        assert top_k_index.dtype == torch.int32

        def expert(row: Tensor, e: int) -> Tensor:
            gate, up = (gate_up_proj[e] @ row).chunk(2)
            return down_proj[e] @ (F.silu(gate) * up)

        return mixture(x, top_k_index, top_k_weights, expert)


CVMM_SOURCE = """
from dataclasses import dataclass, replace
import torch

@dataclass
class CVMMSel:
    raw_sel: torch.Tensor
    sel: torch.Tensor
    sel_index: torch.Tensor
    out_index: object = None
    reduction_weight: object = None

    def clone(self):
        return CVMMSel(self.raw_sel, self.sel, self.sel_index, self.out_index, self.reduction_weight)

def cvmm_prepare_sel2(sel, w=None):
    ssel, index = sel.flatten().sort()
    return CVMMSel(sel, ssel.view_as(sel), index // sel.shape[-1], index, w)

def cvmm(x, sel, keys):
    K = sel.raw_sel.shape[-1]
    rows = x.flatten(0, -2)[sel.sel_index]
    y = torch.einsum("sm,sml->sl", rows.to(keys.dtype), keys[sel.sel.flatten().long()])
    to = sel.sel_index if sel.out_index is None else sel.out_index
    y = torch.zeros_like(y).index_copy(0, to, y).view(-1, K, keys.shape[-1])
    if sel.reduction_weight is None:
        return y
    return (sel.reduction_weight.unsqueeze(-2).to(y.dtype) @ y).squeeze(-2)
"""


def module(name: str, **contents: Any) -> dict[str, ModuleType]:
    """A module of these contents, and the packages that it is in."""
    parts = name.split(".")
    found = {".".join(parts[: i + 1]): ModuleType(".".join(parts[: i + 1])) for i in range(len(parts))}
    vars(found[name]).update(contents)
    return found


STAND_INS = {
    **module("scattermoe.mlp", MLP=ScatterMLP, GLUMLP=ScatterGLU),
    **module("scattermoe.parallel_experts", flatten_sort_count=flatten_sort_count, parallel_linear=parallel_linear),
    **module("sonicmoe.functional", moe_general_routing_inputs=moe_general_routing_inputs),
    **module("sonicmoe.enums", ActivationType=ActivationType),
    **module("liger_kernel.ops.fused_moe", LigerFusedMoEFunction=LigerFusedMoEFunction),
}


PACKAGES = ("scattermoe", "sonicmoe", "liger_kernel", "moe_layer", "cvmm_codex")


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if all peers were there."""
    for name, found in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, found)
    for name in (gpu_peers.MOE_LAYER, gpu_peers.CVMM):
        for part, found in module(name).items():
            monkeypatch.setitem(sys.modules, part, found)
        exec(CVMM_SOURCE, vars(sys.modules[name]))


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if none were."""
    for name in PACKAGES:
        monkeypatch.setitem(sys.modules, name, None)


def wrong(contender: Contender, x: Tensor) -> list[str]:
    found, bad = errors(contender, x, torch.randn(x.shape).to(x.dtype))
    assert {"y", "x", "router.weight", "keys", "values"} <= found.keys()
    return bad


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", gpu_peers.GLU_EXPERTS)
def test_a_peer_computes_what_our_layer_does(name: str, dtype: str, installed: None) -> None:
    for glu in (False, True):
        peers = gpu_peers.GLU_EXPERTS if glu else gpu_peers.EXPERTS
        if name in peers:
            p = Problem(TINY, dtype, CPU, glu=glu)
            assert wrong(p.peer_experts(peers[name][0]), p.x) == []


def test_swapped_halves_would_be_seen(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScatterGLU, "hidden", lambda self, x, e: F.silu((u := self.experts.weight[e] @ x)[:8]) * u[8:])
    p = Problem(TINY, "fp32", CPU, glu=True)
    assert "y" in wrong(p.peer_experts(gpu_peers.ScatterMoE), p.x)


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
def test_cvmm_peers_compute_what_ours_does(down: bool, installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(cvmm.cvmm_case(TINY, "fp32", CPU, down=down).entries) == 4
    case = cvmm.cvmm_case(TINY, "fp32", CPU, down=down, libraries=True)
    (row,) = run_case(case, ["fwdbwd"], 0.01, peers=["ScatterMoE", "moe_layer", "cvmm, 2026"])
    assert {r.name: (r.status, r.note) for r in row.results if r.status != "timed"} == {}
    assert len(row.results) == 5


def test_an_absent_peer_is_a_line_that_says_why(absent: None) -> None:
    p = Problem(TINY, "fp32", CPU, glu=True)
    entries = gpu_peers.entries(p.peer_experts, glu=True)
    assert [e.name for e in entries] == ["ScatterMoE", "moe_layer", "cvmm, 2026", "SonicMoE", "Liger"]
    case = Case("moe-glu", str(TINY), "fp32", p.x, (TINY.T, TINY.D), "none", entries)
    (row,) = run_case(case, ["fwdbwd"], 0.01)
    assert {r.status for r in row.results} == {"not importable"}
    assert all("benchmarks/fetch_gpu_peers.sh" in r.note for r in row.results)


def test_a_peer_is_taken_from_the_folder_and_one_whose_import_fails_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cvmm_codex").mkdir()
    (tmp_path / "cvmm_codex" / "cvmm.py").write_text("raise RuntimeError('no CUDA here')")
    (tmp_path / "versions.txt").write_text("cvmm_codex d43cedc\nscattermoe 47b5e15\n")
    monkeypatch.setattr(gpu_peers, "PEERS", tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("cvmm_codex", gpu_peers.CVMM):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(NotInstalled, match="RuntimeError: no CUDA here"):
        gpu_peers.peer(gpu_peers.CVMM)
    assert gpu_peers.versions() == "cvmm_codex d43cedc, scattermoe 47b5e15"


FETCHED = pytest.mark.skipif(not gpu_peers.PEERS.is_dir(), reason="benchmarks/fetch_gpu_peers.sh has not been run")


@FETCHED
@pytest.mark.exhaustive
@pytest.mark.parametrize("where", ["interpreted", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_the_packages_themselves_compute_what_our_layer_does(where: str) -> None:
    if (where == "gpu") != torch.cuda.is_available():
        pytest.skip(f"not {where} here")
    found = subprocess.run([sys.executable, Path(__file__).with_name("real_peers.py")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr[-1000:]
    for name in ("ScatterMoE, GLU", "moe_layer, cvmm-down", "cvmm, 2026, ReLU", "Liger, GLU"):
        assert f"{name}, fp32 right" in found.stdout


@FETCHED
def test_sonic_moe_is_called_as_its_release_says(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its source is read and not imported: that needs packages which are not here."""
    source = gpu_peers.PEERS / "sonicmoe" / "functional" / "__init__.py"
    name = moe_general_routing_inputs.__name__
    (function,) = (f for f in ast.parse(source.read_text()).body if isinstance(f, ast.FunctionDef) and f.name == name)
    function.body, contents = [ast.Pass()], dict[str, Any]()
    future = "from __future__ import annotations\n"  # its annotations name what is not here
    exec(compile(future + ast.unparse(function), str(source), "exec"), contents)
    signature, calls = inspect.signature(contents[name]), []

    def bound(**arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(signature.bind(**arguments))
        return moe_general_routing_inputs(**arguments)

    monkeypatch.setattr(sys.modules["sonicmoe.functional"], name, bound)
    p = Problem(TINY, "bf16", CPU, glu=True)
    assert wrong(p.peer_experts(gpu_peers.SonicMoE), p.x) == []
    assert calls
    w1 = calls[0].arguments["w1"]  # "Shape (2*I, H, E), stride order (2, 0, 1)"
    assert w1.shape == (2 * TINY.G, TINY.D, TINY.E)
    assert w1.stride() == (TINY.D, 1, 2 * TINY.G * TINY.D)


def test_gpu_peers_take_part_on_a_gpu_only() -> None:
    names = {entry.name for entry in moe_case(TINY, "fp32", CPU).entries}
    assert not names & gpu_peers.GLU_EXPERTS.keys()


@pytest.mark.parametrize("glu", [False, True])
def test_what_experts_keep_is_compared_with_sonic_moes_formula(glu: bool) -> None:
    shape = MoEShape(16384, 1024, 64, 128, 8)
    # 2·T·k·G bytes of bf16, twice for a GLU, and 16 bytes of indices and scores a slot
    assert sonic_bytes(shape, 2, glu=glu) == (1 + glu) * 2 * 16384 * 8 * 128 + 16 * 16384 * 8 + 4 * 65
    p = Problem(TINY, "fp32", CPU, glu=glu)
    alone = ExpertsAlone(p.layer, p.x)
    with sf.backend("reference"):
        assert torch.allclose(alone(p.x), p.layer(p.x), atol=1e-5)
    if not glu:
        assert saved_for_backward(alone, p.x).bytes <= sonic_bytes(TINY, 4, glu=glu) + 8 * TINY.T * TINY.k


def test_what_the_experts_keep_is_measured_with_a_case() -> None:
    case = moe_case(TINY, "fp32", CPU)
    assert case.experts is None  # compared on a GPU only
    p = Problem(TINY, "fp32", CPU, glu=False)
    with sf.backend("torch"):
        (row,) = run_case(replace(case, experts=Experts(ExpertsAlone(p.layer, p.x), 7)), ["fwdbwd"], 0.01, peers=[])
        broken = replace(case, experts=Experts(nn.Linear(3, 3), 7), entries=case.entries[:1])
        (without,) = run_case(broken, ["fwd"], 0.01)
    assert row.experts_bound == 7
    assert row.experts_kept is not None
    assert row.experts_kept >= TINY.T * TINY.k * TINY.G * 4
    assert (without.experts_kept, without.experts_bound) == (None, 7)
    assert row.device == "cpu"
