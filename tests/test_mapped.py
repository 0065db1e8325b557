"""map_experts_: the same outputs bit for bit, from pages of a file that nothing writes and of which little is read."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import sparse_ffn as sf
from sparse_ffn.compress import block_mask_, mapped


class Model(nn.Module):
    def __init__(self, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.a = sf.SigmaMoE(8, 6, 5, 2, bias=True, **place)
        self.b = sf.layers.SharedExpertMoE(sf.SoftmaxMoE(8, 4, 3, 2, glu=True, **place), sf.DenseFFN(8, 3, **place))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(x + self.a(x))
        return y


@pytest.fixture(params=["torch", "safetensors"])
def kind(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


def save(state: dict[str, Tensor], path: Path, kind: str) -> Path:
    if kind == "torch":
        torch.save(state, path)
    else:
        pytest.importorskip("safetensors.torch").save_file(state, path)
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefetch", [False, True])
def test_a_mapped_model_gives_the_loaded_ones_outputs(
    prefetch: bool, dtype: torch.dtype, kind: str, tmp_path: Path
) -> None:
    loaded, x = Model(dtype=dtype).eval(), torch.randn(7, 8).to(dtype)
    path = save(loaded.state_dict(), tmp_path / "model", kind)
    model = Model("meta", dtype)
    sf.map_experts_(model, path, prefetch=prefetch)
    rest = {name: t for name, t in loaded.state_dict().items() if model.get_parameter(name).is_meta}
    assert sorted(rest) == sorted(n for n in loaded.state_dict() if not n.endswith(("keys", "values")) or "shared" in n)
    model.load_state_dict(rest, strict=False, assign=True)
    model.eval()
    with torch.no_grad():
        for tokens in (1, 7):
            assert torch.equal(model(x[:tokens]), loaded(x[:tokens]))
        again = copy.deepcopy(model)
        assert torch.equal(again(x), loaded(x))
    sf.map_experts_(model, path, prefetch=prefetch)  # once more: no second hook
    assert len(model.a._forward_pre_hooks) == prefetch
    model.train()
    (model(x).float().sum() + sf.aux_loss(model)).backward()
    assert model.a.keys.grad is not None


def test_codes_are_mapped_as_they_are(kind: str, tmp_path: Path) -> None:
    def make(device: str) -> sf.MoE:
        layer = sf.SigmaMoE(32, 6, 5, 2, device=device)
        sf.quantize_experts_(layer)
        return layer.eval()

    loaded, model, x = make("cpu"), make("meta"), torch.randn(3, 32)
    path = save(loaded.state_dict(), tmp_path / "model", kind)
    sf.map_experts_(model, path)
    assert all(buffer.device.type == "cpu" for buffer in model.buffers())
    model.router = loaded.router
    with torch.no_grad():
        assert torch.equal(model(x), loaded(x))


def test_tied_stacks_stay_tied(tmp_path: Path) -> None:
    a, b = sf.SigmaMoE(8, 6, 5, 2), sf.SigmaMoE(8, 6, 5, 2)
    b.keys = a.keys
    model = nn.Sequential(a, b)
    sf.map_experts_(model, save(model.state_dict(), tmp_path / "model", "torch"))
    assert a.keys is b.keys
    assert a.values is not b.values


def test_a_state_dict_may_hold_more_than_tensors(tmp_path: Path) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2)
    expected = model.keys.detach().clone()
    sf.map_experts_(model, save({"_extra_state": {"step": 3}, **model.state_dict()}, tmp_path / "model", "torch"))
    assert torch.equal(model.keys, expected)


def distributed(layer: sf.MoE) -> None:
    layer._split = object()


WHOLE = {
    "parametrised": lambda layer: parametrize.register_parametrization(layer, "keys", nn.Identity()),
    "pruned": lambda layer: block_mask_(layer, 0.5, (1, 4)),
    "offloaded": lambda layer: sf.offload_experts_(layer, cache=2, device="cpu"),
    "distributed": distributed,
}


@pytest.mark.parametrize("what", WHOLE)
def test_what_is_no_plain_parameter_is_refused_and_nothing_is_mapped(what: str, tmp_path: Path) -> None:
    model = nn.Sequential(sf.SigmaMoE(8, 6, 5, 2), sf.SigmaMoE(8, 6, 5, 2))
    path, keys = save(model.state_dict(), tmp_path / "model", "torch"), model[0].keys
    WHOLE[what](model[1])
    with pytest.raises(ValueError, match=r"1\.keys must be a plain parameter or rows of quantize_experts_, got"):
        sf.map_experts_(model, path)
    assert model[0].keys is keys


def test_the_file_is_never_written(kind: str, tmp_path: Path) -> None:
    model = Model()
    path = save(model.state_dict(), tmp_path / "model", kind)
    before = digest(path)
    sf.map_experts_(model, path)
    with torch.no_grad():
        model.a.keys.fill_(3)
    assert (model.a.keys == 3).all()
    assert digest(path) == before


def test_only_the_selected_experts_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2, glu=True).eval()
    path = save(model.state_dict(), tmp_path / "model", "torch")
    sf.map_experts_(model, path)
    asked: list[tuple[int, str]] = []
    monkeypatch.setattr(mapped, "_advise", lambda tensor, advice: asked.append((tensor.data_ptr(), advice)))
    model.train()
    model(torch.randn(3, 8))  # a step reads all
    assert not asked
    x = torch.randn(1, 8)
    with torch.no_grad():
        model.eval()(x)
    chosen = model.router(x).index_TK[0].tolist()
    stacks = (model.keys, model.gate_keys, model.values)
    assert len(asked) == 6
    assert set(asked) == {(s[e].data_ptr(), "MADV_WILLNEED") for s in stacks if s is not None for e in chosen}


def test_a_compiled_layer_asks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2).eval()
    sf.map_experts_(model, save(model.state_dict(), tmp_path / "model", "torch"))
    asked: list[str] = []
    advise = torch.compiler.disable(lambda _, advice: asked.append(advice))
    monkeypatch.setattr(mapped, "_advise", advise)
    with torch.no_grad():
        torch.compile(model, backend="eager")(torch.randn(1, 8))
    assert asked == ["MADV_WILLNEED"] * 4


def test_a_mapped_layer_is_exported(tmp_path: Path) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2).eval()
    sf.map_experts_(model, save(model.state_dict(), tmp_path / "model", "torch"))
    x = torch.randn(4, 8)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux reads")
def test_a_cold_token_reads_its_experts_and_little_more(tmp_path: Path) -> None:
    layer = sf.SigmaMoE(256, 64, 64, 2).eval()  # 128 KiB an expert
    path = save(layer.state_dict(), tmp_path / "model", "torch")
    touched = 2 * 2 * 64 * 256 * 4
    sf.map_experts_(layer, path)

    def read() -> int:
        lines = Path("/proc/self/io").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("read_bytes")))

    def forget() -> int:
        """Drop the file from the page cache; returns what has been read so far."""
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return read()

    with path.open("rb", buffering=0) as file:
        before = forget()
        file.read(1)
        if read() == before:
            pytest.skip("this file system keeps its files in memory, or does not count")
        before = forget()
    with torch.no_grad():
        layer(torch.randn(1, 256))
    assert 0 < read() - before <= 1.3 * touched + 2 * 2**20


def test_what_save_pretrained_wrote_in_several_files_is_mapped(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    loaded, model = Model().eval(), Model().eval()
    state = loaded.state_dict()
    files = {name: f"model-0000{i % 2 + 1}-of-00002.safetensors" for i, name in enumerate(state)}
    for file in set(files.values()):
        safetensors.save_file({n: state[n].clone() for n in state if files[n] == file}, tmp_path / file)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for path in (tmp_path, index):
        sf.map_experts_(model, path)
        assert torch.equal(model.a.keys, loaded.a.keys)
        assert torch.equal(model.a.values, loaded.a.values)
    whole = tmp_path / "whole"
    whole.mkdir()
    safetensors.save_file({n: t.clone() for n, t in state.items()}, whole / "model.safetensors")
    sf.map_experts_(model, whole)
    keys = model.a.keys
    for bad in ("[]", "{}", '{"weight_map": {"a.keys": "../model.safetensors"}}', '{"weight_map": {"a.keys": 1}}'):
        index.write_text(bad)
        with pytest.raises(ValueError, match=r"index\.json' must have a weight_map, from names of tensors to files"):
            sf.map_experts_(model, tmp_path)
    index.unlink()
    with pytest.raises(ValueError, match=r"is a folder without model\.safetensors\.index\.json and without"):
        sf.map_experts_(model, tmp_path)
    assert model.a.keys is keys


def test_bad_files_are_named_and_change_nothing(tmp_path: Path) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2)
    state, keys = model.state_dict(), model.keys
    path = tmp_path / "model"
    cases = [
        ({n: t for n, t in state.items() if n != "values"}, "values is not in"),
        ({**state, "values": state["values"][:3]}, r"values must have shape \[6, 5, 8\]"),
        ({**state, "values": state["values"].double()}, "and torch.float32"),
    ]
    for wrong, message in cases:
        torch.save(wrong, path)
        with pytest.raises(ValueError, match=message):
            sf.map_experts_(model, path)
    torch.save([1], path)
    with pytest.raises(ValueError, match="holds no state dict"):
        sf.map_experts_(model, path)
    torch.save(model, path)
    with pytest.raises(ValueError, match="holds more than a state dict"):
        sf.map_experts_(model, path)
    for content in (b"", b"nonsense" * 9, (2).to_bytes(8, "little") + b"[]"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"neither of safetensors nor of torch\.save"):
            sf.map_experts_(model, path)
    with pytest.raises(FileNotFoundError):
        sf.map_experts_(model, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no MoE layer"):
        sf.map_experts_(nn.Linear(2, 2), path)
    assert model.keys is keys
    assert not model._forward_pre_hooks


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2)
    path = save(model.state_dict(), tmp_path / "model.safetensors", "safetensors")
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=rf"{path}' ends at byte {len(whole) - 100}, before \S+ does, at {len(whole)}"):
        sf.map_experts_(model, path)
    for index in (tmp_path / "model.safetensors.index.json", tmp_path):
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {')
        with pytest.raises(ValueError, match="must have a weight_map"):
            sf.map_experts_(model, index)


def test_a_files_metadata_are_no_tensors(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    model = sf.SigmaMoE(8, 6, 5, 2)
    save_file(model.state_dict(), tmp_path / "model", metadata={"dtype": "F32"})
    sf.map_experts_(model, tmp_path / "model")


def test_advice_is_no_obstacle_to_transforms_nor_to_meta(tmp_path: Path) -> None:
    model = sf.SigmaMoE(8, 6, 5, 2).eval()
    sf.map_experts_(model, save(model.state_dict(), tmp_path / "model", "torch"))
    x = torch.randn(3, 4, 8)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    slope = torch.func.grad(lambda x: model(x).sum())(x)
    assert slope.isfinite().all()
    assert slope.any()
    assert model.to("meta")(x.to("meta")).shape == x.shape


def test_codes_with_zero_points_do_not_fit_a_model_without(tmp_path: Path) -> None:
    saved, model = (sf.SigmaMoE(32, 4, 32, 2) for _ in range(2))
    sf.quantize_experts_(saved, sf.ExpertQuantization(symmetric=False))
    sf.quantize_experts_(model, sf.ExpertQuantization(symmetric=True))
    torch.save(saved.state_dict(), tmp_path / "saved.pt")
    before = model.keys.codes.qdata
    with pytest.raises(ValueError, match=r"has keys\.zero_point, values\.zero_point, which the model has not"):
        sf.map_experts_(model, tmp_path / "saved.pt")
    assert model.keys.codes.qdata is before
