"""mask_padding: padding counts neither in balance nor in statistics of the layers within a model of transformers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf

transformers = pytest.importorskip("transformers", minversion="5")

from sparse_ffn.integrations.transformers import mask_padding  # noqa: E402

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
IDS = torch.randint(2, 32, (2, 7), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 1, 0, 0, 0, 0]])
REAL = int(MASK.sum())


def decoder(shared: int = 0) -> Any:
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    sf.sparsify_(model, sf.MoEConfig(expert_size=4, k=2, router="softmax", shared_size=shared))
    return model


def masks(model: nn.Module) -> list[Tensor | None]:
    """What the layers saw in the last forward pass."""
    return [m._last.routed[1] for m in model.modules() if isinstance(m, sf.MoE) and m._last is not None]


@pytest.mark.parametrize("shared", [0, 4])
@pytest.mark.parametrize("positional", [False, True])
def test_layers_see_the_batchs_mask(shared: int, positional: bool) -> None:
    model = decoder(shared)
    expected = model(IDS, attention_mask=MASK).logits
    off = mask_padding(model)
    y = model(IDS, MASK) if positional else model(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(y.logits, expected)  # padding is computed all the same
    for mask in masks(model):
        assert torch.equal(mask, MASK.bool().flatten())
    assert torch.isfinite(sf.aux_loss(model))
    model(IDS)
    assert masks(model) == [None, None]
    model.model.layers[0].mlp(torch.randn(2, 7, 16))  # outside the model's forward pass there is no batch
    assert masks(model)[0] is None
    off()
    model(IDS, attention_mask=MASK)
    assert masks(model) == [None, None]


def test_padding_of_any_length_gives_the_same_balance_loss() -> None:
    model = decoder()
    mask_padding(model)
    found = []
    for length in (5, 7):
        model(IDS[:, :length], attention_mask=MASK[:, :length])
        found.append(sf.aux_loss(model))
    torch.testing.assert_close(*found)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_again_with_the_mask(reentrant: bool) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = decoder().train()
        for layer in model.model.layers:
            layer.mlp.aux = "inject"
            layer.mlp.balance_weight = 3.0
        mask_padding(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(IDS, attention_mask=MASK).logits.square().mean().backward()
        gradients.append(model.model.layers[0].mlp.router.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_copy_has_masks_of_its_own_and_a_pickle_none() -> None:
    model = decoder().train()
    off = mask_padding(model)
    model(IDS, attention_mask=MASK)
    twin, other = copy.deepcopy(model), MASK.flip(0)
    off()
    twin(IDS, attention_mask=other)
    assert all(torch.equal(mask, other.bool().flatten()) for mask in masks(twin))
    mask_padding(model)
    pickled = pickle.loads(pickle.dumps(model))
    pickled(IDS, attention_mask=MASK)
    assert masks(pickled) == [None, None]
    model(IDS, attention_mask=MASK)
    twin(IDS, attention_mask=other)
    assert all(torch.equal(mask, MASK.bool().flatten()) for mask in masks(model))


def test_a_copy_that_runs_before_the_backward_pass_changes_no_gradient() -> None:
    gradients = []
    for copied in (False, True):
        model = decoder().train()
        for layer in model.model.layers:
            layer.mlp.aux, layer.mlp.balance_weight = "inject", 3.0
        mask_padding(model)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        twin = copy.deepcopy(model).eval()
        loss = model(IDS, attention_mask=MASK).logits.square().mean()
        if copied:
            twin(IDS, attention_mask=MASK.flip(0))
        loss.backward()
        gradients.append(model.model.layers[0].mlp.router.weight.grad)
    assert torch.equal(*gradients)


def test_the_mask_of_a_batch_that_failed_is_forgotten() -> None:
    model = decoder()
    mask_padding(model)
    handle = model.lm_head.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS, attention_mask=MASK)
    handle.remove()
    model.model(IDS)
    assert masks(model) == [None, None]


def test_each_half_of_an_encoder_decoder_has_its_own_mask() -> None:
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **sizes))
    sf.sparsify_(model, sf.MoEConfig(expert_size=4, k=2, router="softmax"))
    mask_padding(model)
    other = MASK.flip(0)
    model(IDS, attention_mask=MASK, decoder_input_ids=IDS, decoder_attention_mask=other)
    first, second = masks(model)
    assert torch.equal(first, MASK.bool().flatten())
    assert torch.equal(second, other.bool().flatten())


class OfImages(transformers.PreTrainedModel):
    """As Florence-2 and BLIP-2: what its decoder is said to be is a whole encoder-decoder."""

    config_class = transformers.BartConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.language_model = transformers.BartModel(config)
        self.post_init()

    def get_encoder(self, modality: str | None = None) -> Any:
        return self.language_model.get_encoder()

    def get_decoder(self, modality: str | None = None) -> Any:
        return self.language_model

    def forward(self, **inputs: Any) -> Any:
        return self.language_model(**inputs)


def test_an_encoder_is_no_part_of_a_decoder_that_holds_it() -> None:
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 8}
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    model = OfImages(transformers.BartConfig(vocab_size=32, **heads, **layers))
    batch = {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS}
    seen = sf.calibrate(model, [batch])
    encoder, decoder = sorted(seen, key=lambda name: "decoder" in name)
    assert [len(seen[encoder]), len(seen[decoder])] == [int(MASK.sum()), IDS.numel()]


def test_generation_with_a_cache_goes_on_without_a_mask() -> None:
    model = decoder().eval()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 1, "attention_mask": MASK}
    expected = model.generate(IDS, **options)
    mask_padding(model)
    assert torch.equal(model.generate(IDS, **options), expected)


def test_a_compiled_model_sees_it_too() -> None:
    model = decoder()
    mask_padding(model)
    model(IDS, attention_mask=MASK)
    expected = sf.aux_loss(model)
    compiled = torch.compile(model, backend="eager")
    compiled(input_ids=IDS, attention_mask=MASK)
    torch.testing.assert_close(sf.aux_loss(model), expected)


def test_what_takes_no_mask_or_has_no_layers_is_an_error() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module"):
        mask_padding("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model, a Sequential, takes no attention_mask"):
        mask_padding(nn.Sequential(sf.SigmaMoE(8, 4, 6, 2)))
    with pytest.raises(ValueError, match="model, a LlamaForCausalLM, holds no mixture of experts: convert it first"):
        mask_padding(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)))
