"""Models of many libraries, small and random: every FFN is found, and with k = n_experts nothing changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf

IDS = torch.tensor([[1, 5, 9, 2, 7, 3], [4, 4, 8, 6, 1, 2]])
Made = tuple[nn.Module, Callable[[nn.Module], Tensor], int]
"""A model, what is compared, and how many FFNs it has."""


def _transformers(name: str, n: int, *, wants: str = "last_hidden_state", ids: str = "input_ids", **sizes: Any) -> Made:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}Model")(config)
    if ids == "pixel_values":
        given = {ids: torch.randn(2, 3, 16, 16)}
    elif config.is_encoder_decoder:
        given = {ids: IDS, "decoder_input_ids": IDS}
    else:
        given = {ids: IDS}
    return model, lambda m: m(**given)[wants], n


_LLAMA = {
    "vocab_size": 20, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_BERT = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
_GPT = {"vocab_size": 20, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16}
_T5 = {"vocab_size": 20, "d_model": 16, "d_ff": 48, "d_kv": 8, "num_layers": 1, "num_heads": 2}
_BART = {
    "vocab_size": 20, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 16,
    "activation_dropout": 0.2, "dropout": 0.1,
}  # fmt: skip
_OPT = {
    "vocab_size": 20, "hidden_size": 16, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "word_embed_proj_dim": 16, "max_position_embeddings": 16,
}  # fmt: skip
_VIT = {"image_size": 16, "patch_size": 8, **{k: v for k, v in _BERT.items() if k != "vocab_size"}}


def _whisper() -> Made:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {**_BART, "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 16, "pad_token_id": 0}
    sizes.pop("max_position_embeddings")
    model = transformers.WhisperModel(transformers.WhisperConfig(**sizes))
    given = {"input_features": torch.randn(2, 4, 12), "decoder_input_ids": IDS}
    return model, lambda m: m(**given).last_hidden_state, 2


def _timm(name: str, n: int, *, size: int = 32, **options: Any) -> Made:
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    make = timm.models.MlpMixer if name == "mixer" else lambda **o: timm.create_model(name, **o)
    model = make(num_classes=0, **options)
    x = torch.randn(2, 3, size, size)
    return model, lambda m: m(x), n


def _torchvision(kind: str) -> Made:
    models = pytest.importorskip("torchvision").models
    torch.manual_seed(0)
    if kind == "vit":
        model, size = models.VisionTransformer(16, 8, 2, 2, 16, 48, num_classes=3, dropout=0.1), 16
    elif kind == "convnext":
        settings = [models.convnext.CNBlockConfig(8, 16, 1), models.convnext.CNBlockConfig(16, None, 1)]
        model, size = models.ConvNeXt(settings, num_classes=3), 32
    else:
        model, size = models.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [2, 2], mlp_ratio=3.0, num_classes=3), 32
    x = torch.randn(2, 3, size, size)
    return model, lambda m: m(x), 2


def _x_transformers(**options: Any) -> Made:
    x_transformers = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = x_transformers.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8, ff_mult=3, **options)
    model = x_transformers.TransformerWrapper(num_tokens=20, max_seq_len=16, attn_layers=layers)
    return model, lambda m: m(IDS), 2


def _encoder(**options: Any) -> Made:
    layer = nn.TransformerEncoderLayer(16, 2, 48, batch_first=True, **options)
    x, padding = torch.randn(2, 6, 16), torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
    model = nn.TransformerEncoder(layer, 2)
    # padded rows are zeroed by the fast path only
    return model, lambda m: m(x, src_key_padding_mask=padding)[~padding], 2


def _decoder() -> Made:
    x, memory = torch.randn(6, 2, 16), torch.randn(5, 2, 16)
    layer = nn.TransformerDecoderLayer(16, 2, 48, activation=nn.functional.gelu, norm_first=True)
    return nn.TransformerDecoder(layer, 2), lambda m: m(x, memory), 2


def _sequential() -> Made:
    inner = nn.Sequential(nn.Sequential(nn.Linear(16, 48), nn.SiLU()), nn.Dropout(0.1), nn.Linear(48, 16, bias=False))
    model = nn.Sequential(
        nn.LayerNorm(16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16), nn.LayerNorm(16), inner, nn.Dropout(0.1)
    )
    x = torch.randn(2, 6, 16)
    return model, lambda m: m(x), 2


MODELS: dict[str, Callable[[], Made]] = {
    "transformers GPT-2": lambda: _transformers("GPT2", 2, **_GPT),
    "transformers BERT": lambda: _transformers("Bert", 2, **_BERT),
    "transformers RoBERTa": lambda: _transformers("Roberta", 2, max_position_embeddings=16, **_BERT),
    "transformers DistilBERT": lambda: _transformers("DistilBert", 2, vocab_size=20, dim=16, hidden_dim=48, n_layers=2,
                                                     n_heads=2, max_position_embeddings=16),
    "transformers DeBERTa-v2": lambda: _transformers("DebertaV2", 2, **_BERT),
    "transformers ALBERT": lambda: _transformers("Albert", 1, embedding_size=8, **_BERT),
    "transformers ViT": lambda: _transformers("ViT", 2, ids="pixel_values", **_VIT),
    "transformers DeiT": lambda: _transformers("DeiT", 2, ids="pixel_values", **_VIT),
    "transformers CLIP, vision": lambda: _transformers("CLIPVision", 2, ids="pixel_values", **_VIT),
    "transformers CLIP, text": lambda: _transformers("CLIPText", 2, max_position_embeddings=16, eos_token_id=3,
                                                     **_BERT),
    "transformers Whisper": _whisper,
    "transformers Llama": lambda: _transformers("Llama", 2, **_LLAMA),
    "transformers Llama, biases": lambda: _transformers("Llama", 2, mlp_bias=True, **_LLAMA),
    "transformers Mistral": lambda: _transformers("Mistral", 2, **_LLAMA),
    "transformers Qwen3": lambda: _transformers("Qwen3", 2, **_LLAMA),
    "transformers Gemma 2": lambda: _transformers("Gemma2", 2, **_LLAMA),
    "transformers Phi-3": lambda: _transformers("Phi3", 2, **_LLAMA),
    "transformers SmolLM3": lambda: _transformers("SmolLM3", 2, **_LLAMA),
    "transformers T5": lambda: _transformers("T5", 2, **_T5),
    "transformers T5, gated": lambda: _transformers("T5", 2, feed_forward_proj="gated-gelu", **_T5),
    "transformers BART": lambda: _transformers("Bart", 2, activation_function="gelu", **_BART),
    "transformers OPT": lambda: _transformers("OPT", 2, **_OPT),
    "transformers GPT-NeoX": lambda: _transformers("GPTNeoX", 2, **_BERT),
    "transformers BLOOM": lambda: _transformers("Bloom", 2, vocab_size=20, hidden_size=16, n_layer=2, n_head=2),
    "transformers Falcon": lambda: _transformers("Falcon", 2, ffn_hidden_size=48,
                                                 **{k: v for k, v in _BERT.items() if k != "intermediate_size"}),
    "timm ViT": lambda: _timm("vit_tiny_patch16_224", 2, img_size=32, embed_dim=16, depth=2, num_heads=2),
    "timm Mixer": lambda: _timm("mixer", 4, img_size=32, patch_size=8, embed_dim=16, num_blocks=2),
    "timm ConvNeXt": lambda: _timm("convnext_atto", 4, depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), conv_mlp=False),
    "timm EVA": lambda: _timm("eva02_tiny_patch14_224", 2, size=28, img_size=28, embed_dim=24, depth=2, num_heads=2),
    "torchvision ViT": lambda: _torchvision("vit"),
    "torchvision Swin": lambda: _torchvision("swin"),
    "torchvision ConvNeXt": lambda: _torchvision("convnext"),
    "x-transformers": lambda: _x_transformers(ff_dropout=0.1),
    "x-transformers, GLU": lambda: _x_transformers(ff_glu=True, ff_swish=True),
    "x-transformers, squared ReLU, no bias": lambda: _x_transformers(ff_relu_squared=True, ff_no_bias=True),
    "nn.TransformerEncoder": lambda: _encoder(),
    "nn.TransformerEncoder, pre-LN GELU": lambda: _encoder(activation="gelu", norm_first=True),
    "nn.TransformerDecoder": _decoder,
    "nn.Sequential": _sequential,
}  # fmt: skip


def _input_gradient(model: nn.Module, compared: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of the first float tensor that enters the model's first parametric module."""
    seen: list[Tensor] = []

    def catch(module: nn.Module, args: Any, output: Any) -> Any:
        if not seen and isinstance(output, Tensor) and output.requires_grad:
            seen.append(output)
            output.retain_grad()

    leaves = [m for m in model.modules() if isinstance(m, (nn.Embedding, nn.Conv2d, nn.LayerNorm))]
    handles = [m.register_forward_hook(catch) for m in leaves]
    y = compared(model)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    for handle in handles:
        handle.remove()
    return y.detach(), seen[0].grad


@pytest.mark.parametrize("name", MODELS)
def test_split_into_all_experts_changes_nothing(name: str) -> None:
    model, compared, n = MODELS[name]()
    model.eval()
    dense = copy.deepcopy(model)
    report = sf.sparsify_(model, sf.MoEConfig(router="unweighted", expert_size=4, k=1, init="split"))
    assert len(report.replacements) == n, report
    assert not report.unknown, report
    model = copy.deepcopy(dense)  # again, with k each layer's own number of experts
    full = {name: dataclasses.replace(config, k=config.n_experts) for name, config in report.configs.items()}
    report = sf.sparsify_(model, full)
    assert all(sum(isinstance(m, sf.MoE) for m in model.get_submodule(name).modules()) == 1 for name in report.names)
    with torch.no_grad():
        expected = compared(dense)
        torch.testing.assert_close(compared(model), expected, rtol=1e-4, atol=1e-5)
    y, grad = _input_gradient(model, compared)
    expected, expected_grad = _input_gradient(dense, compared)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5 * expected_grad.abs().max().item())


@pytest.mark.parametrize(
    ("name", "sizes", "up", "why"),
    [
        ("Rwkv", {"context_length": 8}, "feed_forward.key", "receptance.weight"),
        (
            "Zamba2",
            {
                "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_mem_blocks": 1, "adapter_rank": 4,
                "n_mamba_heads": 2, "mamba_headdim": 16, "mamba_ngroups": 1, "num_key_value_heads": 2,
            },
            "shared_transformer.feed_forward.gate_up_proj",
            "gate_up_proj_adapter_list.*.*.weight",
        ),
    ],
)  # fmt: skip
def test_ffns_that_are_more_than_two_linear_maps_are_listed(name: str, sizes: Any, up: str, why: str) -> None:
    layers = len(sizes.get("layers_block_type", "12"))
    model, _, _ = _transformers(name, 0, **{**_BERT, "num_hidden_layers": layers}, **sizes)
    with pytest.warns(sf.SparseFFNWarning, match="no FFN was replaced"):
        report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4))
    assert not report.replacements
    assert len(report.unknown) == 2
    for at, reason in report.unknown.items():
        assert at.endswith(up)
        assert why in reason


def test_gemma_3ns_statistical_topk_is_left_as_it_is() -> None:
    """Its cutoff is made of all gates of a token: no function of a unit's own rows. Without it the FFN is a GLU."""
    gemma = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    config = SimpleNamespace(hidden_size=8, intermediate_size=[16, 16], hidden_activation="gelu_pytorch_tanh")
    config.activation_sparsity_pattern = [0.95, 0.0]
    model = nn.Sequential(*(gemma.Gemma3nTextMLP(config, layer) for layer in range(2)))
    report = sf.sparsify_(model, sf.TopKFFNConfig(k=4, rank_by="gate"))
    assert report.names == ["1"]
    assert list(report.unknown) == ["0"]
