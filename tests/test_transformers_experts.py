"""transformers' MoE models on our kernels: outputs and gradients are those of eager, whatever the experts are."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn import SparseFFNWarning

transformers = pytest.importorskip("transformers", minversion="5")

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS  # noqa: E402

from sparse_ffn.integrations.transformers import register  # noqa: E402

BASE = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 1}
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"intermediate_size": 12, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**ROUTED, "shared_expert_intermediate_size": 20},
    "qwen3_moe": {**ROUTED, "head_dim": 8},
    "deepseek_v3": {
        "moe_intermediate_size": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "first_k_dense_replace": 0, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
        "v_head_dim": 8,
    },
    "gpt_oss": {"intermediate_size": 12, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
}  # fmt: skip


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


def model_of(kind: str, dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **BASE, **MODELS[kind], bos_token_id=0, eos_token_id=0)
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").train()
    for parameter in model.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return model.to(dtype)


def forward_and_backward(model: Any, implementation: str) -> dict[str, Tensor]:
    model.set_experts_implementation(implementation)
    model.zero_grad()
    tokens = torch.randint(0, 32, (2, 7), generator=torch.Generator().manual_seed(1))
    out = model(tokens, labels=tokens)
    out.loss.backward()
    return {"logits": out.logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}


@pytest.mark.parametrize("kind", MODELS)
def test_outputs_and_all_gradients_are_those_of_eager(kind: str) -> None:
    model = model_of(kind)
    expected, actual = forward_and_backward(model, "eager"), forward_and_backward(model, "sparse_ffn")
    assert expected.keys() == actual.keys()
    assert any("down_proj" in name for name in expected)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_native_core_computes_them_too(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    experts = next(m for n, m in model_of(kind, dtype).named_modules() if n.endswith("experts"))
    x, weight, index = (torch.randn(9, 16) / 2).to(dtype), torch.rand(9, 2).to(dtype), torch.randint(0, 4, (9, 2))
    results = []
    for implementation in ("eager", "sparse_ffn"):
        experts.config._experts_implementation = implementation
        inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = experts(inputs[0], index, inputs[1])
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [*inputs, *experts.parameters()])])
    for expected, actual in zip(*results, strict=True):
        assert actual.dtype == dtype
        scale = expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * scale)


def test_experts_without_a_gate_or_with_a_norm_of_their_own() -> None:
    from transformers.models.muse_spark.modeling_muse_spark import MuseSparkExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    sizes: dict[str, Any] = {"hidden_size": 16, "moe_hidden_size": 16, "moe_intermediate_size": 12}
    options: dict[str, Any] = {"mlp_hidden_act": "relu2", "hidden_act": "silu", "post_norm_eps": 1e-6}
    config = SimpleNamespace(**sizes, **options, num_local_experts=4, n_routed_experts=4, moe_latent_size=None)
    for kind in (NemotronHExperts, MuseSparkExperts):
        experts = kind(config).double()
        for parameter in experts.parameters():
            nn.init.normal_(parameter)
        call = torch.randn(9, 16).double(), torch.randint(0, 4, (9, 2)), torch.rand(9, 2).double()
        outputs = []
        for config._experts_implementation in ("eager", "sparse_ffn"):
            outputs.append(experts(*call))
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-10, atol=1e-10)


def test_experts_of_other_processes_add_nothing() -> None:
    experts = next(m for n, m in model_of("mixtral").named_modules() if n.endswith("experts"))
    x, index, weight = torch.randn(5, 16).double(), torch.randint(0, 4, (5, 2)), torch.rand(5, 2).double()
    index[2, 1] = index[3] = 4
    expected = experts(x, index, weight)  # eager: leaves them out
    experts._is_expert_parallel, experts.config._experts_implementation = True, "sparse_ffn"
    torch.testing.assert_close(experts(x, index, weight), expected)
    with pytest.raises(ValueError, match=r"top_k_weights must have the shape of top_k_index, \[5, 2\], got \[5, 4\]"):
        experts(x, index, torch.rand(5, 4).double())


def test_it_computes_on_the_backend_that_is_forced() -> None:
    model = model_of("mixtral")
    expected = forward_and_backward(model, "eager")
    with sf.backend("reference"):
        torch.testing.assert_close(forward_and_backward(model, "sparse_ffn"), expected, rtol=1e-10, atol=1e-12)


def test_a_model_compiles_whole() -> None:
    model = model_of("mixtral", torch.float32).eval()
    model.set_experts_implementation("sparse_ffn")
    tokens = torch.randint(0, 32, (2, 7))
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(tokens).logits, model(tokens).logits)


def test_registering_twice_changes_nothing_and_a_config_names_it() -> None:
    before = ALL_EXPERTS_FUNCTIONS["sparse_ffn"], transformers.PreTrainedModel.post_init
    register()
    assert (ALL_EXPERTS_FUNCTIONS["sparse_ffn"], transformers.PreTrainedModel.post_init) == before
    model = model_of("olmoe")
    model.set_experts_implementation("sparse_ffn")
    assert model.get_experts_implementation()[""] == "sparse_ffn"


def test_a_model_that_never_asks_is_warned_of_wherever_the_choice_is_made(tmp_path: Path) -> None:
    sizes = {"num_layers": 2, "num_decoder_layers": 2, "num_heads": 2, "d_kv": 4, "d_model": 16, "d_ff": 12}
    sparse = {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "num_experts": 4}
    config = transformers.SwitchTransformersConfig(vocab_size=32, **sizes, **sparse)
    model = transformers.SwitchTransformersForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path)
    says = r"SwitchTransformersSparseMLP never asks .*: it computes as before, and not by 'sparse_ffn'"
    with pytest.warns(SparseFFNWarning, match=says):
        loaded = type(model).from_pretrained(tmp_path, experts_implementation="sparse_ffn").eval()
    with pytest.warns(SparseFFNWarning, match=says):
        model.set_experts_implementation({"": "sparse_ffn"})
    tokens = torch.randint(0, 32, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(*(m(input_ids=tokens, decoder_input_ids=tokens).logits for m in (loaded, model)))


def test_the_package_alone_imports_no_transformers() -> None:
    check = "import sys, sparse_ffn, sparse_ffn.integrations; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", check], check=True)
