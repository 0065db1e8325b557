"""Converted transformers models: saved, loaded, generating, trained by the Trainer with the balance loss active."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import sparse_ffn as sf
from sparse_ffn.layers import SparseFFN
from sparse_ffn.routing import SigmoidRouter

transformers = pytest.importorskip("transformers", minversion="5")

from sparse_ffn.integrations.transformers import from_pretrained, record_conversion  # noqa: E402

TOKENS = {"vocab_size": 32, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
SIZES = {**TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
MODELS: dict[str, dict[str, Any]] = {
    "GPT2LMHeadModel": {**TOKENS, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32},
    "LlamaForCausalLM": SIZES,
    "BertForMaskedLM": {**SIZES, "max_position_embeddings": 32},  # its FFN is spread over two modules
    "GPTNeoXForCausalLM": SIZES,  # these two draw new weights for a class that is not of their own module
    "FalconH1ForCausalLM": {
        **SIZES,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 16,
        "mamba_n_heads": 2,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
    },
}


def model_of(name: str) -> Any:
    torch.manual_seed(0)
    cls = getattr(transformers, name)
    return cls(cls.config_class(**MODELS[name])).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(2, 32, shape, generator=torch.Generator().manual_seed(1))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tokens(2, 7)).logits


@pytest.mark.exhaustive  # a process without any other model of the class
def test_a_base_model_gives_its_hidden_states_though_no_plain_one_was_made(tmp_path: Path) -> None:
    """transformers keeps by the class's qualified name what outputs it records."""
    model = transformers.LlamaModel(transformers.LlamaConfig(**SIZES)).eval()
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=2, k=1)))
    model.save_pretrained(tmp_path)
    program = (
        "import sys, torch; from sparse_ffn.integrations.transformers import from_pretrained; "
        "found = from_pretrained(sys.argv[1])(torch.arange(6)[None], output_hidden_states=True); "
        "assert len(found.hidden_states) == 3"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


@pytest.mark.parametrize("name", MODELS)
def test_a_converted_model_is_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model = model_of(name)
    dense = logits(model)
    report = sf.sparsify_(model, sf.MoEConfig(n_experts=4, k=2, router="softmax", balance="bias", init="cluster"))
    record_conversion(model, report)
    model.save_pretrained(tmp_path)
    loaded, found = from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(found.values())
    assert type(loaded) is type(model)
    assert not torch.equal(logits(model), dense)
    assert torch.equal(logits(loaded), logits(model))
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert str(loaded) == str(model)
    loaded.save_pretrained(tmp_path / "again")  # the record survives
    assert torch.equal(logits(from_pretrained(str(tmp_path / "again"))), logits(model))


def test_what_is_set_on_a_layer_after_the_conversion_is_saved(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=1))
    first, second = (layer.mlp for layer in model.model.layers)
    first.k, first.aux = 3, "inject"
    record_conversion(model, report)
    second.k, second.dropout, second.router.expert_dropout, second.balance_weight = (
        2,
        0.25,
        0.5,
        (0.1,),
    )  # and after that
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert str(loaded) == str(model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.model.layers[0].mlp.k = 4  # a loaded model is saved the same way
    loaded.save_pretrained(tmp_path / "again")
    assert str(from_pretrained(str(tmp_path / "again"))) == str(loaded)


def test_copies_and_pickles_record_their_own_layers(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=1)))
    model.model.layers[0].mlp.k = 2
    twin, config = copy.deepcopy(model), copy.deepcopy(model.config)
    twin.model.layers[0].mlp.k = 3
    pickled = pickle.loads(pickle.dumps(model))
    for made, k in ((model, 2), (twin, 3), (pickled, 2)):
        made.save_pretrained(tmp_path)
        assert from_pretrained(str(tmp_path)).model.layers[0].mlp.k == k
    assert config.sparse_ffn["model.layers.0.mlp"]["k"] == 2
    config, model = model.config, weakref.ref(model)
    gc.collect()
    assert model() is None  # a config keeps no model alive
    assert config.to_dict()["sparse_ffn"]["model.layers.0.mlp"]["k"] == 2


def test_a_layer_that_the_record_cannot_describe_is_saved_with_a_warning_and_not_loaded(tmp_path: Path) -> None:
    """transformers has emptied the file when it asks for the record: an error would leave it empty."""
    model = model_of("LlamaForCausalLM")
    report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=1))
    record_conversion(model, report)
    model.save_pretrained(tmp_path)

    class Own(SigmoidRouter):
        pass

    model.model.layers[1].mlp.router = Own(16, 4, 1)
    copy.deepcopy(model)  # which saves nothing
    with pytest.raises(ValueError, match=r"'model\.layers\.1\.mlp' cannot be recorded: .*Own"):
        record_conversion(model, report)
    with pytest.warns(sf.SparseFFNWarning, match=r"'model\.layers\.1\.mlp' cannot be recorded: .*Own.*its weights"):
        model.save_pretrained(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["sparse_ffn"]
    assert record["model.layers.0.mlp"]["n_experts"] == 4
    with pytest.raises(
        ValueError, match=r"model\.layers\.1\.mlp: it could not be recorded when the model was saved: .*Own"
    ):
        from_pretrained(str(tmp_path))
    model.model.layers[1].mlp.router = SigmoidRouter(16, 4, 1)
    model.save_pretrained(tmp_path)  # and all is well again
    assert torch.equal(logits(from_pretrained(str(tmp_path))), logits(model))


def test_experts_that_were_replaced_by_constants_are_saved_and_loaded(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.MoEConfig(router="unweighted", n_experts=4, k=2)))
    sf.prune_experts_(model, sf.expert_stats(model, [tokens(2, 7)]), keep=0.5, replace="mean")
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert loaded.model.layers[0].mlp.null_experts == 2
    assert torch.equal(logits(loaded), logits(model))


def test_a_layer_that_became_dense_again_is_recorded_as_what_it_is(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.MoEConfig(router="unweighted", n_experts=4, k=4)))
    model.model.layers[0].mlp = sf.to_dense(model.model.layers[0].mlp)
    model.model.layers[1].mlp = model_of("LlamaForCausalLM").model.layers[1].mlp  # transformers' own
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert type(loaded.model.layers[0].mlp) is sf.DenseFFN
    assert type(loaded.model.layers[1].mlp) is type(model.model.layers[1].mlp)
    assert torch.equal(logits(loaded), logits(model))


ZAMBA = {
    **SIZES, "num_hidden_layers": 6, "attention_hidden_size": 32, "num_key_value_heads": 2, "n_mamba_heads": 2,
    "mamba_d_state": 4, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1,
}  # fmt: skip


class TiedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class TiedConfig(transformers.PreTrainedConfig):
    model_type = "tied"
    tie_word_embeddings: bool = True


transformers.AutoConfig.register("tied", TiedConfig)


class TiedModel(transformers.PreTrainedModel):
    """Its ties name parameters that are gone when its FFNs are converted."""

    config_class = TiedConfig
    base_model_prefix = "model"
    _tied_weights_keys: ClassVar[dict[str, str]] = {
        f"blocks.{i}.{n}": f"blocks.0.{n}" for i in (1, 2) for n in TiedBlock().state_dict()
    }

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.embedding = nn.Embedding(32, 16)
        self.blocks = nn.ModuleList([TiedBlock() for _ in range(4)])  # the last one is its own
        self.post_init()

    def forward(self, input_ids: Tensor) -> Any:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x)
        return SimpleNamespace(logits=x)


def tied(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "explicit":
        return TiedModel(TiedConfig()).eval()
    return transformers.ZambaForCausalLM(transformers.ZambaConfig(**ZAMBA)).eval()


@pytest.mark.parametrize("balance", ["entropy", "bias"])  # the latter has a buffer
@pytest.mark.parametrize("kind", ["Zamba", "explicit"])
def test_a_model_whose_blocks_are_tied_is_saved_and_loaded(kind: str, balance: str, tmp_path: Path) -> None:
    model = tied(kind)
    report = sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2, balance=balance, init="cluster"))
    layers = list(dict.fromkeys(m for m in model.modules() if isinstance(m, sf.SigmaMoE)))
    assert (len(report.replacements), len(layers)) == ((2, 1) if kind == "Zamba" else (4, 2))
    if balance == "bias":
        for layer in layers:
            layer.router.bias.copy_(torch.randn(4))
    record_conversion(model, report)
    layers[0].k = 3
    model.save_pretrained(tmp_path)
    loaded, found = from_pretrained(str(tmp_path), type(model), output_loading_info=True)
    assert not any(found.values())
    assert len({id(m) for m in loaded.modules() if isinstance(m, sf.SigmaMoE)}) == len(layers)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(logits(loaded), logits(model))
    for made in (model, loaded):
        made.tie_weights()  # as resizing the vocabulary does
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(str(tmp_path / "again"), type(model))), logits(model))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "8 bits": lambda model: sf.quantize_experts_(model, sf.ExpertQuantization(bits=8, group_size=8)),
    "residuals": lambda model: sf.compress.compress_experts_(model, 3),
    "constants": lambda model: sf.prune_experts_(model, sf.expert_stats(model, [tokens(2, 7)]), 3, replace="mean"),
    "host memory": lambda model: sf.offload_experts_(model, cache=2, device="cpu"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["Zamba", "explicit"])
def test_tied_blocks_whose_experts_were_changed_are_saved_and_loaded(kind: str, change: str, tmp_path: Path) -> None:
    model = tied(kind)
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2, init="cluster")))
    CHANGES[change](model)
    model.save_pretrained(tmp_path)
    loaded, found = from_pretrained(str(tmp_path), type(model), output_loading_info=True)
    assert not any(found.values())
    layers = [{id(m) for m in of.modules() if isinstance(m, SparseFFN)} for of in (model, loaded)]
    assert len(layers[0]) == len(layers[1])
    torch.testing.assert_close(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(from_pretrained(str(tmp_path / "again"), type(model))), logits(loaded))


class OldModel(TiedModel):
    """As transformers before 5.3, which calls this without what was loaded."""

    def mark_tied_weights_as_initialized(self, *loading_info: Any) -> None:
        if loading_info:
            self.mark_tied_weights_as_initialized()


def test_the_oldest_transformers_does_not_say_what_was_loaded(tmp_path: Path) -> None:
    model = OldModel(TiedConfig()).eval()
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2, balance="bias")))
    model.save_pretrained(tmp_path)
    loaded, found = from_pretrained(str(tmp_path), OldModel, output_loading_info=True)
    assert not any(found.values())
    assert torch.equal(logits(loaded), logits(model))


def test_the_config_is_taken_from_where_the_weights_are(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.TopKFFNConfig(k=5)))
    model.save_pretrained(tmp_path / "inner")
    loaded = from_pretrained(str(tmp_path), subfolder="inner")
    assert torch.equal(logits(loaded), logits(model))


def test_options_of_the_config_are_set_in_it_and_others_are_the_models(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.TopKFFNConfig(k=5)))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path), use_cache=False, pad_token_id=5, dtype=torch.bfloat16)
    assert (loaded.config.use_cache, loaded.config.pad_token_id) == (False, 5)
    assert loaded.model.layers[0].mlp.keys.dtype == torch.bfloat16
    eager = from_pretrained(str(tmp_path), config=str(tmp_path), attn_implementation="eager")
    assert eager.config._attn_implementation == "eager"
    torch.testing.assert_close(logits(eager), logits(model))
    judge = from_pretrained(str(tmp_path), transformers.LlamaForSequenceClassification, num_labels=3, pad_token_id=1)
    assert judge.score.out_features == 3


def test_a_pickled_model_is_recorded_anew(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    with pytest.raises(ValueError, match="report must be given: the config of model records no conversion yet"):
        record_conversion(model)
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=1)))
    pickled = pickle.loads(pickle.dumps(model))
    record_conversion(pickled)
    pickled.model.layers[0].mlp.k = 3
    pickled.save_pretrained(tmp_path)
    assert from_pretrained(str(tmp_path)).model.layers[0].mlp.k == 3


def test_several_conversions_another_class_and_another_dtype(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(k=1, n_experts=4), lambda m, name: "0" in name))
    record_conversion(model, sf.sparsify_(model, sf.TopKFFNConfig(k=6)))
    model.save_pretrained(tmp_path)
    loaded = from_pretrained(str(tmp_path))
    assert isinstance(loaded.model.layers[0].mlp, sf.SigmaMoE)
    assert isinstance(loaded.model.layers[1].mlp, sf.TopKFFN)
    assert torch.equal(logits(loaded), logits(model))

    headless = from_pretrained(str(tmp_path), transformers.LlamaModel, dtype=torch.bfloat16)
    assert headless.layers[0].mlp.keys.dtype == torch.bfloat16
    wide = model.model(tokens(2, 7)).last_hidden_state
    torch.testing.assert_close(headless(tokens(2, 7)).last_hidden_state.float(), wide, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "LlamaForCausalLM"])
def test_a_converted_model_generates_as_its_whole_forward_says(name: str) -> None:
    model = model_of(name)
    sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2))
    prompt = tokens(2, 5)
    written = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        pad_token_id=1,
    )  # fmt: skip
    assert written.shape == (2, 11)
    with torch.no_grad():  # with a cache, token by token, against all tokens at once; eos is suppressed in both
        scores = model(written).logits[:, 4:-1].index_fill(-1, torch.tensor([1]), -torch.inf)
    assert torch.equal(written[:, 5:], scores.argmax(-1))


def test_so_are_those_whose_output_is_of_another_width(tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = transformers.MarkupLMModel(transformers.MarkupLMConfig(**TOKENS, **sizes)).eval()
    batch = {"input_ids": tokens(2, 8)}
    expected = model(**batch)[0]
    report = sf.sparsify_(model, sf.DenseFFNConfig(), example_inputs=batch)
    assert any(isinstance(layer, sf.DenseFFN) and layer.d_out != layer.d_model for layer in model.modules())
    record_conversion(model, report)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        loaded = from_pretrained(str(tmp_path))(**batch)[0]
        torch.testing.assert_close(loaded, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(loaded, model(**batch)[0])


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_ffns_that_only_an_example_shows_are_loaded_without_one(dropout: float, tmp_path: Path) -> None:
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes = {"d_model": 8, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "attention_window": 4}
    config = transformers.LEDConfig(**TOKENS, **layers, **sizes, activation_dropout=dropout)
    model = transformers.LEDForConditionalGeneration(config).eval()
    batch = {"input_ids": tokens(2, 8), "decoder_input_ids": tokens(2, 8)}
    report = sf.sparsify_(model, sf.MoEConfig(router="unweighted", n_experts=4, k=2), example_inputs=batch)
    assert [new.match is not None for new in report.replacements] == [True, False]  # the decoder's runs by itself
    record_conversion(model, report)
    model.save_pretrained(tmp_path)
    loaded, found = from_pretrained(str(tmp_path), output_loading_info=True)
    assert not any(found.values())
    assert str(loaded) == str(model)
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, model(**batch).logits)
        headless = from_pretrained(str(tmp_path), transformers.LEDModel)
        assert torch.equal(headless(**batch)[0], model.led(**batch)[0])
    loaded.save_pretrained(tmp_path / "again")
    assert str(from_pretrained(str(tmp_path / "again"))) == str(model)
    path = tmp_path / "config.json"
    good = json.loads(path.read_text())
    (name, match), *_ = good["sparse_ffn_matches"].items()
    for bad in (
        {"down": "led.lost"},
        {"down": name},
        {"edits": [["lost", "act", None]]},
        {"edits": [["", "lost", None]]},
    ):
        path.write_text(json.dumps({**good, "sparse_ffn_matches": {name: {**match, **bad}}}))
        with pytest.raises(ValueError, match=f"what is known of the FFN at '{name}' does not fit this model"):
            from_pretrained(str(tmp_path))
    path.write_text(json.dumps({**good, "sparse_ffn_matches": [1]}))
    with pytest.raises(ValueError, match=r"sparse_ffn_matches of the config must map names .* got \[1\]"):
        from_pretrained(str(tmp_path))
    del good["sparse_ffn_matches"]  # as before there were matches
    path.write_text(json.dumps(good))
    with pytest.raises(ValueError, match=f"no FFN is at '{name}' of config; .*; {name}: .* does not run by itself"):
        from_pretrained(str(tmp_path))


def test_a_dtype_in_which_transformers_would_keep_parts_of_ffns_in_fp32_is_a_warning(tmp_path: Path) -> None:
    """T5 overflows in fp16, and its ``wo`` is then kept in fp32: a converted layer has one dtype."""
    sizes = {"d_model": 8, "d_ff": 16, "d_kv": 4, "num_layers": 1, "num_heads": 2}
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(vocab_size=32, **sizes))
    for config in (sf.SigmaMoEConfig(n_experts=4), sf.MoEConfig(expert_size=4, k=2, shared_size=4)):
        twin = copy.deepcopy(model)
        record_conversion(twin, sf.sparsify_(twin, config))
        twin.save_pretrained(tmp_path)
        words = r"encoder\.block\.0\.layer\.1\.DenseReluDense\.wo\.weight is in torch\.float16, and 1 more: .*fp32"
        with pytest.warns(sf.SparseFFNWarning, match=words) as caught:
            from_pretrained(str(tmp_path), dtype=torch.float16)
        assert caught[0].filename == __file__
        from_pretrained(str(tmp_path), dtype=torch.bfloat16)
        from_pretrained(str(tmp_path))


def test_a_missing_or_wrong_record_is_an_error(tmp_path: Path) -> None:
    model, other = model_of("LlamaForCausalLM"), model_of("GPT2LMHeadModel")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"records no conversion: call record_conversion\(model, report\)"):
        from_pretrained(str(tmp_path))
    two = {"balance": ("entropy", "z"), "balance_weight": (1e-3, 1e-4)}
    report = sf.sparsify_(model, sf.SigmaMoEConfig(expert_size=8, **two))
    record_conversion(model, report)
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"model_class must be a model's own class.*AutoModelForCausalLM"):
        from_pretrained(str(tmp_path), transformers.AutoModelForCausalLM)
    assert from_pretrained(str(tmp_path), local_files_only=True).model.layers[0].mlp.balance == ("entropy", "z")
    theirs = sf.sparsify_(model_of("LlamaForCausalLM"), sf.SigmaMoEConfig(n_experts=4))
    with pytest.raises(ValueError, match=r"another model: of this one 'model.layers.0.mlp', .* was not converted"):
        record_conversion(model_of("LlamaForCausalLM"), theirs)
    with pytest.raises(ValueError, match=r"report is of another model: this one has no 'model.layers.0.mlp'"):
        record_conversion(other, report)
    assert not hasattr(other.config, "sparse_ffn")


RECORD = {"config": "TopKFFNConfig", "d_ff": 24, "k": 5}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (["model.layers.0.mlp"], "sparse_ffn must map names of modules to configs, got .*'model.layers.0.mlp'"),
        ("TopKFFN", "sparse_ffn must map names of modules to configs, got 'TopKFFN'"),
        ({"model.layers.0.mlp": None}, "sparse_ffn, model.layers.0.mlp: values must be what to_dict returned"),
        (
            {"model.layers.0.mlp": {**RECORD, "config": "Evil"}},
            "sparse_ffn, model.layers.0.mlp: the config of values must be one of .* got 'Evil'",
        ),
        ({"model.layers.0.mlp": {"k": 5}}, "the config of values must be one of .* got None"),
        (
            {"model.layers.0.mlp": {**RECORD, "gain": 2}},
            "sparse_ffn, .*: values has 'gain', but TopKFFNConfig only init",
        ),
        ({"model.layers.0.mlp": {**RECORD, "k": "5"}}, "sparse_ffn, model.layers.0.mlp: k must be an int, got '5'"),
        ({"model.layers.0.mlp": {**RECORD, "k": 25}}, "k must be at least 1 and at most d_ff = 24, got 25"),
        ({"model.layers.7.mlp": RECORD}, "no FFN is at 'model.layers.7.mlp' of config; there are"),
    ],
)
def test_a_corrupt_record_is_named(record: Any, words: str, tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.TopKFFNConfig(k=5)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sparse_ffn": record}))
    with pytest.raises(ValueError, match=words):
        from_pretrained(str(tmp_path))


def test_a_config_without_its_architecture_asks_for_the_class(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.TopKFFNConfig(k=5)))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": None}))
    with pytest.raises(TypeError, match=r"model_class must be .* got None for architectures = None"):
        from_pretrained(str(tmp_path))
    assert torch.equal(logits(from_pretrained(str(tmp_path), type(model))), logits(model))


def test_missing_weights_of_a_converted_layer_are_an_error(tmp_path: Path) -> None:
    model = model_of("LlamaForCausalLM")
    record_conversion(model, sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2)))
    state = model.state_dict()
    del state["model.layers.1.mlp.values"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks weights of converted layers: model\.layers\.1\.mlp\.values$"):
        from_pretrained(str(tmp_path))


def trained_router(weight: float, folder: Path) -> Tensor:
    """The first router after one step of the Trainer with plain gradient descent, as change per learning rate."""
    model = model_of("LlamaForCausalLM")
    sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2, aux="inject", balance_weight=weight))
    router = model.model.layers[0].mlp.router.weight
    with torch.no_grad():
        router.normal_(generator=torch.Generator().manual_seed(2))  # unbalanced
    before = router.detach().clone()
    options = transformers.TrainingArguments(
        str(folder), max_steps=1, learning_rate=0.5, lr_scheduler_type="constant", optim="sgd", use_cpu=True,
        per_device_train_batch_size=2, save_strategy="no", report_to="none", max_grad_norm=0.0, disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(2, 7)]
    transformers.Trainer(model, options, train_dataset=data).train()
    assert sf.aux_loss(model) == 0  # injected, so that nobody adds it twice
    return (router.detach() - before) / 0.5


def test_the_trainer_trains_with_the_balance_loss_active(tmp_path: Path) -> None:
    without, with_balance = trained_router(0.0, tmp_path), trained_router(3.0, tmp_path)

    model = model_of("LlamaForCausalLM").train()  # the same by hand: the balance loss's own gradient
    sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=4, k=2, balance_weight=3.0))
    layers = [layer.mlp for layer in model.model.layers]
    with torch.no_grad():
        layers[0].router.weight.normal_(generator=torch.Generator().manual_seed(2))
    model(tokens(2, 7))
    (gradient,) = torch.autograd.grad(sf.aux_loss(model), layers[0].router.weight)
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(with_balance - without, -gradient, rtol=1e-3, atol=1e-4)
