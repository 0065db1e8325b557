"""Convert a Hugging Face model: its FFNs become sparse, it is saved, loaded again, and generates.

python examples/convert_hf.py                              # a small Llama with random weights, nothing is downloaded
python examples/convert_hf.py --model FOLDER_OR_NAME --experts 16 --k 8
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import sparse_ffn as sf
from sparse_ffn.integrations.transformers import from_pretrained, record_conversion


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal language model: a folder, or a name on the Hugging Face hub")
    parser.add_argument("--experts", type=int, default=8, help="experts of each FFN (default 8)")
    parser.add_argument("--k", type=int, help="experts for a token; default all, which keeps the model's outputs")
    parser.add_argument("--out", help="folder for the converted model; default a temporary one")
    return parser.parse_args(argv)


def load(name: str | None) -> Any:
    if name is not None:
        return AutoModelForCausalLM.from_pretrained(name).eval()
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=0, eos_token_id=1, **sizes)).eval()


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> float:
    """Returns how far the logits moved, relative to their size."""
    args = parse(argv)
    model = load(args.model)
    tokens = torch.randint(2, model.config.vocab_size, (4, 32), generator=torch.Generator().manual_seed(0))
    before = model(tokens).logits

    seen = sf.calibrate(model, [tokens])  # take real text here
    k = args.experts if args.k is None else args.k
    config = sf.MoEConfig(n_experts=args.experts, k=k, router="unweighted", init="cluster")
    report = sf.sparsify_(model, config, calibration=seen)
    print(report)
    after = model(tokens).logits
    moved = float((after - before).norm() / before.norm())
    print(f"logits moved by {moved:.2e} of their size")

    record_conversion(model, report)  # from here on model.save_pretrained saves all that loading needs
    with tempfile.TemporaryDirectory() as temporary:
        model.save_pretrained(args.out or temporary)
        loaded = from_pretrained(args.out or temporary).eval()
    assert torch.equal(loaded(tokens).logits, after)
    prompt = tokens[:1, :8]
    text = loaded.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=8, do_sample=False)
    print("saved, loaded, the same logits; it writes", text[0, 8:].tolist())
    return moved


if __name__ == "__main__":
    main()
