"""Make a mixture of experts of transformers smaller: its experts in 4 or 8 bits, saved and loaded as codes."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch
import transformers

import sparse_ffn as sf
from sparse_ffn.integrations.transformers import from_pretrained


def made() -> transformers.PreTrainedModel:
    """A model from a config."""
    config = transformers.MixtralConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> float:
    """Quantise, save, load; returns the relative difference of the logits on a few tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="folder of a model; without it a small Mixtral of random weights")
    parser.add_argument("--out", help="where to save the smaller model; without it nothing is kept")
    parser.add_argument("--bits", type=int, default=4, choices=(4, 8), help="of keys; values have 8")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    kind = transformers.AutoModelForCausalLM
    model = kind.from_pretrained(options.model, dtype=torch.bfloat16) if options.model else made()
    tokens = torch.randint(0, model.config.vocab_size, (1, 32))
    before = model.eval()(tokens).logits.float()
    print(sf.quantize_experts_(model, sf.ExpertQuantization(bits=options.bits, values_bits=8)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or temporary
        model.save_pretrained(folder)
        loaded = from_pretrained(folder).eval()
    after = loaded(tokens).logits.float()
    error = ((after - before).norm() / before.norm()).item()
    print(f"logits differ by {error:.2%}")
    return error


if __name__ == "__main__":
    main()
