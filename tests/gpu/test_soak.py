"""A soak on a GPU: what a race, a graph, a second card or a miscompile would change, often and at production sizes.

Without a GPU each test is rehearsed: few repeats, small sizes, the interpreter's programs in another order each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import test_bag
import torch
from net import ROUTINGS, TOLERANCE, check, cvmm_case, expert_case, tf32
from test_seeded_bugs import alarm, swap
from torch import Tensor

import sparse_ffn as sf
from sparse_ffn.backends.triton import bag, config

pytestmark = [pytest.mark.gpu, pytest.mark.exhaustive]

GPU = torch.cuda.is_available()
REPEATS, REPLAYS = (1000, 60) if GPU else (1, 2)
TOKENS, WIDTH = (16384, 1024) if GPU else (6, 16)
E, G, K = (64, 128, 8) if GPU else (3, 16, 2)
LAYERS: dict[str, Callable[[], sf.SparseFFN]] = {
    "relu": lambda: sf.SigmaMoE(WIDTH, E, G, K),
    "glu": lambda: sf.SoftmaxMoE(WIDTH, E, G, K, glu=True, activation="silu"),
    "memory": lambda: sf.ProductKeyMemory(WIDTH, *((256, 32) if GPU else (4, 2)), n_heads=2 if GPU else 1),
    "topk": lambda: sf.TopKFFN(WIDTH, *((4096, 32) if GPU else (16, 1))),
}


def made(name: str, device: str) -> tuple[sf.SparseFFN, Tensor, Tensor]:
    """A layer in bf16, its input and the gradient of its output."""
    layer = LAYERS[name]().to(device, torch.bfloat16)
    x, grad = (torch.randn(TOKENS, WIDTH, device=device, dtype=torch.bfloat16) for _ in range(2))
    return layer, x.requires_grad_(), grad


def step(layer: sf.SparseFFN, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and the gradients of the input and of all parameters."""
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, (x, *layer.parameters()), grad)]


def bits(x: Tensor) -> Tensor:
    """The numbers as integers: NaN is equal to itself, and the zeros are two."""
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def soak(run: Callable[[], list[Tensor]], repeats: int) -> None:
    """Assert that all runs give the same bits; the device is asked once, so that their kernels follow one another."""
    first = run()
    differing = torch.zeros(len(first), dtype=torch.int64, device=first[0].device)
    for turn in range(repeats):
        disturb(turn)
        differing += torch.stack([(bits(a) != bits(b)).any() for a, b in zip(first, run(), strict=True)])
    assert differing.tolist() == [0] * len(first), f"of {repeats} repeats so many differ, output first"


def disturb(turn: int) -> None:
    """Let the programs of the next kernels begin in another order: other work takes some of the processors."""
    if not GPU:
        import interpreter

        interpreter.seed = turn + 1
        return
    with torch.cuda.stream(_SIDE):
        noise = torch.ones(256 + 256 * (turn % 7), 1024, device="cuda")
        noise @ noise.T


_SIDE = torch.cuda.Stream() if GPU else None


@contextmanager
def another_stream() -> Iterator[None]:
    """Work in a stream of its own, between what comes before and after."""
    if not GPU:
        yield
        return
    before, side = torch.cuda.current_stream(), torch.cuda.Stream()
    side.wait_stream(before)
    with torch.cuda.stream(side):
        yield
    before.wait_stream(side)


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """A CUDA graph's replay of what runs; where there is no GPU it just runs again."""
    if not GPU:
        return run
    with another_stream():  # compiles and warms up
        for _ in range(3):
            run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LAYERS)
def test_repeats_of_a_training_step_are_equal_to_the_bit(name: str, device: str, triton_backend: None) -> None:
    layer, x, grad = made(name, device)
    soak(lambda: step(layer, x, grad), REPEATS)


@pytest.mark.skipif(GPU, reason="a fault may corrupt the GPU's memory")
def test_a_race_is_caught(tmp_path: Path) -> None:
    """The parts of a row of the table are written to one place, where the last one stays."""
    source, old = Path(str(bag.__file__)).read_text(), "(tl.load(row_part + r) + nth)"
    assert old in source, "the fault no longer fits the source"
    (tmp_path / "faulty_bag.py").write_text(source.replace(old, "tl.load(row_part + r)"))

    def soaked() -> None:
        case = test_bag.bag_case("one hot row")
        values, weight = (case.tensors[n].float().requires_grad_() for n in ("values", "weight"))

        def run() -> list[Tensor]:
            y = case.op(values=values, weight=weight, index=case.tensors["index"])
            return list(torch.autograd.grad(y.sum(), (values, weight)))

        with pytest.MonkeyPatch.context() as patch, sf.backend("triton"):
            patch.setattr(config, "BAG", config.Bag(cap=8))  # the row has several parts
            soak(run, 5)

    assert not alarm(soaked)
    assert alarm(lambda: (swap(bag, tmp_path / "faulty_bag.py"), soaked()))


@pytest.mark.parametrize("name", LAYERS)
def test_graphs_replay_on_a_second_stream_what_a_new_routing_asks_for(
    name: str, device: str, triton_backend: None
) -> None:
    layer, x, grad = made(name, device)
    found: list[Tensor] = []

    def run() -> None:
        found[:] = step(layer, x, grad)

    replay = recorded(run)
    for turn in range(REPLAYS):
        tokens = torch.randn_like(x)
        if turn % 3:  # all of them, or half of them, choose the same experts
            tokens[:: turn % 3] = tokens[0]
        with torch.no_grad():
            x.copy_(tokens)
        with another_stream():
            replay()
        replayed = [t.clone() for t in found]
        for got, expected in zip(replayed, step(layer, x, grad), strict=True):
            assert torch.equal(bits(got), bits(expected)), f"replay {turn}"


def test_a_card_that_is_not_the_current_one(device: str) -> None:
    if GPU and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    other = "cuda:1" if GPU else device
    for case in (expert_case(form="everything"), cvmm_case(form="gather, scatter, reduction")):
        check(case, other)
    check(test_bag.bag_case("random"), other)
    for name in LAYERS:
        with sf.backend("triton"):
            results = step(*made(name, other))
        assert all(t.isfinite().all() for t in results), name
    assert not GPU or torch.cuda.current_device() == 0


@pytest.mark.parametrize("arithmetic", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("units", [64, 128, 256] if GPU else [16])
@pytest.mark.parametrize("form", ["plain", "everything"])
def test_all_gradients_at_production_sizes(
    form: str, units: int, arithmetic: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A compiler can be wrong without a word (Liger-Kernel issue 1294): each release meets each architecture here."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(arithmetic, torch.float32)
    if arithmetic == "tf32":
        monkeypatch.setitem(TOLERANCE, dtype, 5e-3)  # 10 bits, which may be cut off
    monkeypatch.setitem(ROUTINGS, "production", lambda: (E, torch.rand(TOKENS // 4, E).topk(K).indices))
    case = expert_case("production", dtype, form=form, activation="silu", sizes=(WIDTH, units, WIDTH))
    for name in case.tensors.keys() & {"keys", "gate_keys", "values"}:  # of a size that fp16 holds the sums of
        case.tensors[name] *= (units if name == "values" else WIDTH) ** -0.5
    with tf32(arithmetic == "tf32"):
        check(case, device)
