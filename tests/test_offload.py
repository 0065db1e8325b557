"""offload_experts_: the resident layer's outputs from any cache, a brute-force LRU's hits, no slot read too soon."""

from __future__ import annotations

import copy
import io
import pickle
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.compress import offload
from sparse_ffn.layers import MixedMoE
from sparse_ffn.layers.rows import OffloadedRows
from sparse_ffn.layers.rows.copies import Copies
from sparse_ffn.layers.rows.lru import LRU

E, K, G, D = 6, 2, 5, 16
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "glu": {"glu": True, "bias": True, "activation": "silu"},
    "null": {"null_experts": 2, "null_kind": "identity"},
}


def layer_of(form: str = "glu", dtype: torch.dtype = torch.float32, *, coded: bool = False) -> sf.MoE:
    layer = sf.MoE(D, E, G, K, dtype=dtype, **FORMS[form]).eval()
    with torch.no_grad():
        if layer.key_bias is not None:
            layer.key_bias.normal_()
    if coded:
        sf.quantize_experts_(layer, sf.ExpertQuantization(group_size=8))
    return layer


def offloaded(layer: sf.MoE, cache: float) -> sf.MoE:
    twin = copy.deepcopy(layer)
    sf.offload_experts_(twin, cache=cache, device="cpu")
    return twin


def touched(layer: sf.MoE, x: Tensor) -> list[int]:
    return sorted(e for e in set(layer.router(x).index_TK.flatten().tolist()) if e < E)


class ByHand:
    """The least recently used expert goes, those that are here come first."""

    def __init__(self, n_slots: int) -> None:
        self.n_slots, self.here, self.hits, self.misses = n_slots, [], 0, 0

    def call(self, experts: list[int]) -> None:
        for e in [e for e in experts if e in self.here] + [e for e in experts if e not in self.here]:
            self.hits, self.misses = self.hits + (e in self.here), self.misses + (e not in self.here)
            self.here = [*(other for other in self.here if other != e), e][-self.n_slots :]


@pytest.mark.parametrize("n_slots", [1, 3, 7])
def test_the_cache_is_a_brute_force_lru(n_slots: int) -> None:
    draw, lru, exact, slots = random.Random(0), LRU(n_slots), ByHand(n_slots), {}
    for _ in range(200):
        experts = draw.sample(range(9), draw.randint(0, 9))
        exact.call(sorted(experts))
        for wave in lru.waves(experts):
            assert len(wave) <= n_slots
            taken = {e: lru.take(e)[0] for e in wave}
            assert len(set(taken.values())) == len(wave)  # no two in one slot
            slots |= taken
        assert [e for e in range(9) if e in lru] == sorted(exact.here)
        assert len({slots[e] for e in exact.here}) == len(exact.here)


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "codes"])
@pytest.mark.parametrize("form", FORMS)
def test_every_cache_gives_the_resident_layers_outputs(form: str, coded: bool) -> None:
    """Bit for bit where one token's experts fit; hits, misses and bytes are those of the brute force."""
    layer = layer_of(form, coded=coded)
    for cache in range(K, E + 1):
        twin, exact = offloaded(layer, cache), ByHand(cache)
        with torch.no_grad(), sf.backend("torch"):
            for tokens in (1, 1, 3, 40, 1, 0, 2, 40, 1):
                x = torch.randn(tokens, D)
                y, expected, experts = twin(x), layer(x), touched(layer, x)
                if len(experts) <= cache and tokens == 1:
                    assert torch.equal(y, expected)
                torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
                exact.call(experts)
        (stats,) = sf.offload_stats(twin).values()
        a_expert = layer.keys.n_bytes() * 2 // E if coded else 4 * G * D * 2
        a_expert += (a_expert // 2) * (layer.gate_keys is not None)
        assert stats == {"hits": exact.hits, "misses": exact.misses, "bytes": exact.misses * a_expert}


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "codes"])
def test_a_token_is_the_same_whatever_was_decoded_before(coded: bool) -> None:
    """Of three experts or more the order of a sum shows; in the cache they stand in any."""
    layer = sf.SigmaMoE(D, 8, 16, 4).eval()
    if coded:
        sf.quantize_experts_(layer, sf.ExpertQuantization(group_size=8))
    twin = offloaded(layer, 4)
    with torch.no_grad(), sf.backend("torch"):
        for x in torch.randn(40, 1, D):
            assert torch.equal(twin(x), layer(x))


def test_transforms_of_an_offloaded_layer_are_refused() -> None:
    twin = offloaded(layer_of("plain"), E)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"do not work inside torch\.func's transforms"):
        torch.func.vmap(twin)(torch.randn(2, 3, D))


@pytest.mark.parametrize("way", [torch.export.export, torch.jit.trace], ids=["export", "trace"])
def test_a_program_of_an_offloaded_layer_is_refused(way: Callable[[nn.Module, tuple[Tensor]], object]) -> None:
    twin = offloaded(layer_of("plain"), E)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"cannot be exported or traced.*dequantize_experts_"):
        way(twin, (torch.randn(3, D),))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=["bf16", "fp64"])
def test_waves_are_added_in_fp32_at_least(dtype: torch.dtype) -> None:
    layer = layer_of(dtype=dtype)
    twin, x = offloaded(layer, K), torch.randn(50, D).to(dtype)
    with torch.no_grad():
        y = twin(x)
        assert y.dtype == dtype
        torch.testing.assert_close(y, layer(x), rtol=2e-2 if dtype == torch.bfloat16 else 1e-12, atol=2e-2)


class Late(Copies):
    """Copies that arrive when they are waited for; until then their slots hold NaN. Slots in use are remembered."""

    def __init__(self, of: Copies) -> None:
        self.pairs, self.pending, self.busy = of.pairs, {}, set()

    def start(self, places: list[tuple[int, int]]) -> None:
        for slot, expert in places:
            assert slot not in self.busy
            self.pending[slot] = expert
            for _, table in self.pairs:
                table[slot] = torch.nan

    def wait(self, slots: list[int]) -> None:
        for slot in slots:
            if slot in self.pending:
                self._copy(slot, self.pending.pop(slot))
        self.busy = set(slots)

    def used(self) -> None:
        self.busy = set()


def test_what_computes_has_waited_for_its_copies() -> None:
    layer = layer_of()
    twin = offloaded(layer, 3)
    twin.values.cache.copies = Late(twin.values.cache.copies)
    with torch.no_grad():
        for tokens in (1, 30, 2, 1, 30):
            x = torch.randn(tokens, D)
            twin.prefetch(torch.randn(2, D))
            torch.testing.assert_close(twin(x), layer(x), rtol=1e-5, atol=1e-6)


def test_threads_that_share_a_layer_get_the_resident_layers_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = layer_of()
    twin = copy.deepcopy(offloaded(layer, K))
    monkeypatch.setattr(Copies, "wait", lambda *_: time.sleep(1e-3))  # another thread goes on before this one computes

    @torch.no_grad()
    def serve(x: Tensor) -> None:
        twin.prefetch(x)
        torch.testing.assert_close(twin(x), layer(x))

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(serve, torch.randn(20, 1, D)))


def test_a_cache_made_in_inference_mode_serves_outside_of_it() -> None:
    layer, x = layer_of(), torch.randn(3, D)
    with torch.inference_mode():
        twin = offloaded(layer, 3)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), layer(x))


def test_prefetched_experts_are_hits() -> None:
    layer = layer_of("null")
    twin, x = offloaded(layer, 4), torch.randn(1, D)
    twin.prefetch(x)
    (before,) = sf.offload_stats(twin).values()
    experts = len(touched(layer, x))
    assert before == {"hits": 0, "misses": 0, "bytes": experts * 4 * G * D * 2}
    with torch.no_grad():
        twin(x)
    assert sf.offload_stats(twin)[""] == {**before, "hits": experts}
    twin.prefetch(torch.randn(50, D))  # more than there is room for
    with pytest.raises(RuntimeError, match="offload_experts_ was not called"):
        layer.prefetch(x)


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = nn.Sequential(*(layer_of(coded=coded) for coded in (False, True)))
    twin.load_state_dict(torch.load(file))
    return twin.eval()


def thawed(model: nn.Module) -> nn.Module:
    sf.dequantize_experts_(model)
    return model


@pytest.mark.parametrize("way", [copy.deepcopy, through_pickle, saved_and_loaded, thawed], ids=lambda way: way.__name__)
def test_a_model_with_two_layers_through(way: Callable[[nn.Module], nn.Module]) -> None:
    """Layers have caches of their own; the state dict is that of the model before."""
    model, x = nn.Sequential(layer_of(), layer_of(coded=True)), torch.randn(9, D)
    names = list(model.state_dict())
    with torch.no_grad():
        expected = model(x)
        sf.offload_experts_(model, cache=0.5, device="cpu")
        assert sorted(model.state_dict()) == sorted(names)
        assert [child.values.cache.lru.n_slots for child in model] == [3, 3]
        assert model[0].values.cache is model[0].keys.cache is not model[1].keys.cache
        model(x)
        torch.testing.assert_close(way(model)(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("coded", [False, True], ids=["dense", "codes"])
def test_tied_stacks_are_tied_again(coded: bool) -> None:
    a, b = layer_of(), layer_of()
    b.keys = a.keys
    model = nn.Sequential(a, b)
    if coded:
        sf.quantize_experts_(model, sf.ExpertQuantization(group_size=8))
    sf.offload_experts_(model, cache=3, device="cpu")
    sf.dequantize_experts_(model)
    assert isinstance(a.keys, nn.Parameter)
    assert a.keys is b.keys
    assert a.values is not b.values


def test_offloaded_rows_say_what_they_are_and_stay() -> None:
    model = nn.Sequential(layer_of(coded=True))
    sf.offload_experts_(model, cache=3, device="cpu")
    rows = model[0].keys
    assert isinstance(rows, OffloadedRows)
    assert "bits=4, dtype=torch.float32, cache=3 on cpu" in repr(rows)
    assert rows.n_bytes() == E * G * (D // 2 + D // 8 * 5)
    assert model.to("cpu").requires_grad_(False)[0].keys is rows
    with pytest.raises(TypeError, match="convert the model before offload_experts_"):
        model.bfloat16()
    with pytest.raises(RuntimeError, match="are offloaded: load before offload_experts_"):
        model.load_state_dict(model.state_dict())


def test_they_do_not_train() -> None:
    layer = offloaded(layer_of(), 3)
    x = torch.randn(2, D, requires_grad=True)
    y = layer(x)  # without no_grad, as evaluation often is
    with pytest.raises(RuntimeError, match="no gradients: compute under"):
        y.sum().backward()
    layer.train()
    for ask in (layer, layer.prefetch):
        with pytest.raises(RuntimeError, match=r"in evaluation only: call eval\(\)"):
            ask(x)


@pytest.mark.exhaustive
def test_a_compiled_model_breaks_its_graph_there() -> None:
    layer = offloaded(layer_of(), 3)
    with torch.no_grad():
        x = torch.randn(4, D)
        torch.testing.assert_close(torch.compile(layer, backend="eager")(x), layer(x))


def test_the_banks_of_a_mixed_layer_have_a_cache_each() -> None:
    layer = sf.layers.MixedMoE(D, [(3, 4), (2, 8)], K).eval()
    twin, x = copy.deepcopy(layer), torch.randn(9, D)
    sf.offload_experts_(twin, cache=2, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(twin(x), layer(x))
    assert list(sf.offload_stats(twin)) == ["banks.0", "banks.1"]


def split(layer: sf.MoE) -> sf.MoE:
    layer._split = object()
    return layer


REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "no layer": (lambda: nn.Linear(2, 2), {}, "the model has no MoE layer"),
    "few": (layer_of, {"cache": 1}, r"cache = 1 is less than the k = 2 of '0'"),
    "a small share": (layer_of, {"cache": 0.1}, r"cache = 0.1, 1 experts of 6, is less than the k = 2"),
    "twice": (lambda: offloaded(layer_of(), 2), {}, "1.keys are offloaded already"),
    "meta": (lambda: sf.MoE(D, E, G, K, device="meta"), {}, "1.keys is on meta"),
    "distributed": (lambda: split(layer_of()), {}, "1.keys must be a plain parameter or rows"),
    "another device": (layer_of, {"device": "meta"}, "device must be a CUDA device or 'cpu', got 'meta'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_offloaded_is_refused_and_stays(what: str) -> None:
    make, options, words = REFUSED[what]
    model = nn.ModuleDict({"0": nn.Identity() if what == "no layer" else layer_of(), "1": make()})
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=words):
        sf.offload_experts_(model, **{"cache": 3, "device": "cpu", **options})
    assert dict(model.named_modules()) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(RuntimeError, match="torch sees no CUDA device"):
        sf.offload_experts_(layer_of(), cache=3)


def test_memory_that_cannot_be_locked_is_told_once_and_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Tensor) -> Tensor:
        raise RuntimeError("no such memory")

    monkeypatch.setattr(Tensor, "pin_memory", fail)
    t = torch.randn(3)
    with pytest.warns(sf.SparseFFNWarning, match=r"no page-locked memory .*no such memory"):
        assert torch.equal(offload._host(t, True), t)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("coded", [False, True], ids=["dense", "codes"])
def test_on_a_gpu(coded: bool) -> None:
    """A slow copy stream, random routings, two layers: a slot read too early or overwritten too early would show."""
    model = nn.Sequential(layer_of(coded=coded), layer_of(coded=coded))
    resident = copy.deepcopy(model).cuda()
    sf.offload_experts_(model, cache=K)
    model.cuda()
    assert model[0].keys.device.type == "cuda"
    draw = random.Random(0)
    with torch.no_grad():
        for step in range(100):
            x = torch.randn(draw.choice((1, 1, 2, 40)), D, device="cuda")
            for layer in model:
                with torch.cuda.stream(layer.values.cache.copies._side()):
                    torch.cuda._sleep(draw.randrange(1_000_000))
            if step % 3 == 0:
                model[1].prefetch(torch.randn_like(x))
            torch.testing.assert_close(model(x), resident(x), rtol=1e-4, atol=1e-5)
            if len(x) == 1:
                y, cached = model[0](x), model[0](x)
                assert torch.equal(y, cached)
                assert torch.equal(y, resident[0](x))


def test_an_interrupted_call_leaves_no_expert_that_was_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of("plain"), torch.randn(3, D)
    twin, expected = offloaded(layer, cache=E), layer(x).detach()

    def interrupt(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with torch.no_grad():
        with monkeypatch.context() as patched:
            patched.setattr(Copies, "_copy", interrupt)
            with pytest.raises(KeyboardInterrupt):
                twin(x)
        torch.testing.assert_close(twin(x), expected)


def test_what_an_offloaded_layer_refuses_is_not_counted() -> None:
    layer = sf.MoE(D, E, G, K, balance="bias").eval()
    sf.offload_experts_(layer, cache=E, device="cpu")
    layer.train()
    for refused in (lambda: layer(torch.randn(3, D)), lambda: layer.prefetch(torch.randn(3, D))):
        with pytest.raises(RuntimeError, match="in evaluation only"):
            refused()
    assert not layer.router.load.any()


def test_what_an_offloaded_mixture_of_sizes_refuses_is_not_counted() -> None:
    layer = MixedMoE(D, [(2, 3), (2, 5)], K, balance="bias").eval()
    sf.offload_experts_(layer, cache=2, device="cpu")
    with pytest.raises(RuntimeError, match="in evaluation only"):
        layer.train()(torch.randn(5, D))
    assert not layer.router.load.any()
