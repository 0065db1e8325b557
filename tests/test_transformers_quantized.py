"""The experts of transformers' models quantised: the function of the rounded weights, saved and loaded as codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn import ExpertQuantization, dequantize_experts_, quantize_experts_
from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.layers.rows import QuantizedRows

transformers = pytest.importorskip("transformers", minversion="5")

from test_transformers_experts import MODELS, model_of  # noqa: E402
from test_transformers_families import FAMILIES, mixture, named_in_the_docs  # noqa: E402

from sparse_ffn.integrations.experts import dispatches  # noqa: E402
from sparse_ffn.integrations.transformers import from_pretrained, register  # noqa: E402

TOKENS = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
FOUR = ExpertQuantization(group_size=4)
FORMS = {"4 bits": FOUR, "8 bits": ExpertQuantization(bits=8), "mixed": ExpertQuantization(group_size=8, values_bits=8)}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def experts_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if dispatches(module)]


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_are_those_of_eager_by_the_rounded_weights(kind: str) -> None:
    model = model_of(kind, torch.float32).eval()
    before = logits(model)
    report = quantize_experts_(model, FOUR)
    found = logits(model)
    assert len(report.layers) == 1
    assert isinstance(experts_of(model)[0].down_proj, QuantizedRows)
    assert 0 < (found - before).norm() < 0.3 * before.norm()
    dequantize_experts_(model)
    model.set_experts_implementation("eager")
    torch.testing.assert_close(logits(model), found, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_saved_and_loaded_as_codes(kind: str, form: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if form == "8 bits" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
        pytest.skip("transformers before 5.23 saves one scale a row in a shape that cannot be loaded again")
    model = model_of(kind, dtype).eval()
    quantize_experts_(model, FORMS[form])
    expected = logits(model)
    model.save_pretrained(tmp_path)
    dense = [p for p in model.parameters() if p.dim() == 3]
    assert not dense
    assert "sparse_ffn_experts" in json.loads((tmp_path / "config.json").read_text())
    twin, info = from_pretrained(str(tmp_path), output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]
    assert type(twin) is type(model)
    state = twin.state_dict()
    for name, tensor in model.state_dict().items():
        if "experts" not in name:
            continue
        assert state[name].dtype == tensor.dtype, name
        assert torch.equal(state[name], tensor), name
    if dtype == torch.float32:  # .to(bfloat16) rounds rotary frequencies, too, which loading makes anew
        assert torch.equal(logits(twin.eval()), expected)


def test_our_own_layers_in_a_converted_model_too(tmp_path: Path) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()
    report = sf.sparsify_(model, sf.MoEConfig(n_experts=4, k=2))
    sf.integrations.transformers.record_conversion(model, report)
    quantize_experts_(model, FOUR, lambda module, name: ".1." in name)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    twin = from_pretrained(str(tmp_path)).eval()
    assert torch.equal(logits(twin), expected)
    first, second = (module for module in twin.modules() if isinstance(module, sf.MoE))
    assert isinstance(first.keys, nn.Parameter)
    assert isinstance(second.keys, QuantizedRows)


def test_what_was_quantised_before_the_integration_was_imported_is_recorded_with_the_conversion(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32, **sizes)).eval()
    report = sf.sparsify_(model, sf.MoEConfig(n_experts=4, k=2))
    with monkeypatch.context() as patch:
        patch.setattr("sparse_ffn.compress.stacks.CHANGED", [])
        quantize_experts_(model, FOUR)
    sf.integrations.transformers.record_conversion(model, report)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(str(tmp_path)).eval()), logits(model))


def test_experts_that_are_not_stored_keep_their_implementation() -> None:
    model = model_of("mixtral", torch.float32)
    model.set_experts_implementation("eager")
    model.extra = sf.SigmaMoE(8, 4, 8, 2)
    quantize_experts_(model, FOUR, lambda module, name: name == "extra")
    dequantize_experts_(model)
    assert model.config._experts_implementation == "eager"


@pytest.mark.parametrize("chosen", ["eager", {"": "grouped_mm"}], ids=str)
def test_stored_rows_keep_ours(chosen: Any) -> None:
    model = model_of("mixtral", torch.float32).eval()
    quantize_experts_(model, FOUR)
    expected = logits(model)
    with pytest.raises(ValueError, match="experts_implementation must be 'sparse_ffn' for experts that are stored"):
        model.set_experts_implementation(chosen)
    assert torch.equal(logits(model), expected)
    model.set_experts_implementation({})  # what is not named stays


@pytest.mark.parametrize("kind", ["fp8", "fp4"])
def test_transformers_own_codes_are_no_experts_of_numbers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its 8-bit floats have scales beside them and a registry of their own: they compute as they do."""
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    config = pytest.importorskip("transformers.utils.quantization_config").FineGrainedFP8Config(
        weight_block_size=(8, 8)
    )
    monkeypatch.setattr(config, "expert_dtype", kind, raising=False)
    model = fp8.replace_with_fp8_linear(model_of("mixtral", torch.float32), ["lm_head", "gate", "self_attn"], config)
    (experts,) = {type(module) for module in model.modules() if hasattr(module, "is_transposed")}
    for change in (quantize_experts_, lambda model: sf.offload_experts_(model, cache=2, device="cpu")):
        with pytest.raises(ValueError, match="FP8Experts: no plain stacks of numbers"):
            change(model)
    register()
    with pytest.warns(SparseFFNWarning, match="MixtralSparseMoeBlock never asks transformers"):
        model.set_experts_implementation("sparse_ffn")
    monkeypatch.setattr(experts.forward, "__wrapped__", lambda module, x, *rest: x)
    held = next(module for module in model.modules() if isinstance(module, experts))
    x = torch.randn(3, 8)
    assert held(x, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2)) is x


def test_a_part_has_no_config_to_say_what_is_stored() -> None:
    model = model_of("mixtral", torch.float32)
    with pytest.warns(SparseFFNWarning, match="a MixtralDecoderLayer is no model of transformers") as told:
        quantize_experts_(model.model.layers[0], FOUR)
    assert told[0].filename == __file__


def test_a_record_is_of_what_is_stored_now() -> None:
    model = model_of("mixtral", torch.float32)
    quantize_experts_(model, FOUR)
    fact = {"bits": 4, "group_size": 4, "symmetric": False}
    assert model.config.sparse_ffn_experts == {"model.layers.0.mlp.experts": {"gate_up_proj": fact, "down_proj": fact}}
    dequantize_experts_(model)
    assert model.config.sparse_ffn_experts == {}


def test_lost_codes_and_damaged_records_are_errors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = model_of("gpt_oss", torch.float32)
    quantize_experts_(model, FOUR)
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    state = safetensors.load_file(path)
    del state["model.layers.0.mlp.experts.down_proj.scale"]
    safetensors.save_file(state, path, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of .*experts\.down_proj\.scale"):
        from_pretrained(str(tmp_path))
    good = json.loads((tmp_path / "config.json").read_text())
    name = "model.layers.0.mlp.experts"
    for record, words in (
        (["x"], "must map names of modules"),
        ({"nowhere": {"down_proj": {}}}, "of 'nowhere' are stored, which the model does not have"),
        ({name: {"down_proj": {"bits": 3}}}, f"down_proj of {name}: bits must be 4 or 8"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(good | {"sparse_ffn_experts": record}))
        with pytest.raises(ValueError, match=words):
            from_pretrained(str(tmp_path))


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "family", sorted(FAMILIES.keys() - named_in_the_docs())
)  # those compute their experts themselves
def test_every_family_on_the_interface_is_quantised(family: str) -> None:
    """On the meta device: where the stacks are, and that their rows lie along the width that the hidden states have."""
    register()
    model, _ = mixture(family)
    experts = experts_of(model)
    assert experts
    report = quantize_experts_(model, ExpertQuantization(bits=8))
    assert len(report.layers) == len(experts)
    for module in experts:
        up = module.gate_up_proj if getattr(module, "has_gate", True) else module.up_proj
        (_, two, width), (_, size, out) = up.shape, module.down_proj.shape
        assert width == out
        assert two == size * (2 if getattr(module, "has_gate", True) else 1)
