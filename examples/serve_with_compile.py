"""Serve a converted model through torch.compile: one graph for requests of every length.

python examples/serve_with_compile.py                      # needs a C++ compiler, as torch.compile does on the CPU
python examples/serve_with_compile.py --backend aot_eager  # needs none, and is no faster
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparse_ffn as sf


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default inductor)")
    parser.add_argument("--requests", type=int, default=20, help="requests to serve (default 20)")
    parser.add_argument("--width", type=int, default=256, help="of the model (default 256)")
    args = parser.parse_args(argv)
    if args.requests < 1:
        parser.error(f"--requests {args.requests} is not at least 1")
    return args


def converted(width: int) -> Any:
    """A small Llama whose FFNs are sparse; load yours with sparse_ffn.integrations.transformers.from_pretrained."""
    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, bos_token_id=0, eos_token_id=1, **sizes)).eval()
    sf.sparsify_(model, sf.SigmaMoEConfig(n_experts=16, k=4))
    return model


@torch.inference_mode()
def serve(answer: Callable[[Tensor], Tensor], requests: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """The next token's scores for each request, and tokens per second."""
    begin = time.perf_counter()
    answers = [answer(tokens) for tokens in requests]
    return answers, sum(t.numel() for t in requests) / (time.perf_counter() - begin)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the number of graphs that torch.compile made."""
    args = parse(argv)
    model = converted(args.width)
    graphs = torch._dynamo.utils.counters["stats"]

    def answer(tokens: Tensor) -> Tensor:
        scores: Tensor = model(tokens, use_cache=False).logits[:, -1]
        return scores

    compiled = torch.compile(answer, fullgraph=True, dynamic=True, backend=args.backend)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 128, (args.requests,), generator=generator).tolist()
    requests = [torch.randint(2, 256, (1, n), generator=generator) for n in lengths]

    before = graphs["unique_graphs"]
    serve(compiled, requests[:2])  # compiles
    serve(answer, requests[:2])
    expected, eager_speed = serve(answer, requests)
    answers, speed = serve(compiled, requests)
    for got, want in zip(answers, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    made = graphs["unique_graphs"] - before
    print(f"{len(requests)} requests of {min(lengths)} to {max(lengths)} tokens, {made} graph(s) compiled")
    print(f"{eager_speed:,.0f} tokens/s without torch.compile, {speed:,.0f} with it")
    return made


if __name__ == "__main__":
    main()
