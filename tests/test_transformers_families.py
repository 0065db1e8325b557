"""Every MoE family of the installed transformers: its experts run on our kernels, or choosing them is a warning."""

from __future__ import annotations

import copy
import importlib
import inspect
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_ffn import SparseFFNWarning

transformers = pytest.importorskip("transformers", minversion="5")

from sparse_ffn.integrations.experts import MOE, dispatches  # noqa: E402
from sparse_ffn.integrations.transformers import register  # noqa: E402

DOCS = Path(__file__).parents[1] / "docs" / "integrations.md"
MODELS = Path(transformers.__file__).parent / "models"
CLASSES = re.compile(rf"^class (\w*{MOE.pattern.removesuffix('$')})\(nn\.Module", re.MULTILINE)
CONFIGS: dict[str, dict[str, Any]] = {
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 4}},
    "deepseek_ocr2": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "diffusion_gemma": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12},
    "doge": {"is_moe": True},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1},
    "gemma4": {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 12},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"num_hidden_layers": 4, "layer_types": ["conv", "full_attention"] * 2},
    "qwen4_exp": {
        "indexer_budget": 8, "indexer_compress_ratio": 2, "indexer_n_heads": 2, "indexer_kv_heads": 1,
        "indexer_head_dim": 256,
    },
    "vitpose_backbone": {"num_experts": 4, "part_features": 8},
}  # fmt: skip
"""What configs lack to make a mixture of experts by default."""


def families() -> dict[str, str]:
    """Names of modeling files that have MoE modules, and their folders."""
    found = {}
    for path in sorted(MODELS.glob("*/modeling_*.py")):
        source = path.read_text()
        if "@use_experts_implementation" in source or CLASSES.search(source):
            found[path.stem.removeprefix("modeling_")] = path.parent.name
    return found


FAMILIES = families()


def mixture(family: str) -> tuple[Any, list[str]]:
    """The family's first model that has MoE modules, on the meta device, and the warnings of its making."""
    module = importlib.import_module(f"transformers.models.{FAMILIES[family]}.modeling_{family}")
    failures = []
    for cls in vars(module).values():
        own = inspect.isclass(cls) and cls.__module__ == module.__name__
        if not own or not issubclass(cls, transformers.PreTrainedModel) or cls.__name__.endswith("PreTrainedModel"):
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                config = cls.config_class(**CONFIGS.get(family, {}))
                with torch.device("meta"):
                    model = cls._from_config(config, experts_implementation="sparse_ffn")
            except Exception as error:
                failures.append(f"{cls.__name__}: {error!r}")
                continue
        if any(MOE.search(type(m).__name__) or dispatches(m) for m in model.modules()):
            return model, [str(w.message) for w in caught if w.category is SparseFFNWarning]
    raise AssertionError(f"no model with experts can be made of {family}: say in CONFIGS how ({'; '.join(failures)})")


def named_in_the_docs() -> set[str]:
    paragraph = next(line for line in DOCS.read_text().split("\n\n") if "compute their experts themselves" in line)
    return set(re.findall(r"`([a-z0-9_]+)`", paragraph.partition(":")[2].partition(".")[0]))


def tiny(experts: Any) -> Any:
    """Experts of the same class with few and small matrices, in fp64."""
    config = copy.deepcopy(experts.config)
    config = getattr(config, "text_config", config)
    for name, value in list(vars(config).items()):
        if re.search(r"(intermediate|ffn|hidden|expert|latent)\w*(size|dim)$", name) and value is not None:
            vars(config)[name] = 16 if name.endswith("hidden_size") else 12  # past the checks of types
        elif re.search(r"experts$", name) and not re.search(r"per|top|shared", name) and isinstance(value, int):
            vars(config)[name] = min(value, 4)
    made = type(experts)(config).double()
    for parameter in made.parameters():
        nn.init.normal_(parameter, 0.0, 0.4)
    return made


@pytest.fixture(autouse=True)
def registered() -> None:
    register()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_runs_on_our_kernels_or_is_named_and_warned_of(family: str) -> None:
    model, said = mixture(family)
    experts = {type(m): m for m in model.modules() if dispatches(m)}
    if family in named_in_the_docs():
        assert not experts
        assert len(said) == 1
        assert re.search(r"in \w+ \w+(, \w+)* never asks transformers for an experts implementation", said[0])
        with pytest.warns(SparseFFNWarning, match="never asks") as caught:
            model.set_experts_implementation("sparse_ffn")
        assert caught[0].filename == __file__
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.set_experts_implementation("eager")
        return
    assert experts
    assert not said
    for big in experts.values():
        small = tiny(big)
        weight = small.gate_up_proj if small.has_gate else small.up_proj
        width = weight.shape[1] if small.is_transposed else weight.shape[2]
        x, index = torch.randn(9, width, dtype=torch.float64), torch.randint(0, weight.shape[0], (9, 2))
        gate = torch.rand(9, 2, dtype=torch.float64)
        results = []
        for small.config._experts_implementation in ("eager", "sparse_ffn"):
            inputs = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
            y = small(inputs[0], index, inputs[1])
            results.append([y, *torch.autograd.grad(y.square().sum(), [*inputs, *small.parameters()])])
        for expected, actual in zip(*results, strict=True):  # some of theirs compute in fp32
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6 * expected.abs().max().item())


def test_the_docs_name_no_family_that_there_is_not() -> None:
    named = named_in_the_docs()
    assert {"llama4", "longcat_flash", "jetmoe", "nllb_moe", "switch_transformers"} <= named
    assert named <= FAMILIES.keys()
