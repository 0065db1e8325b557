"""Train MoEUT, whose few layers are applied again and again, beside the dense transformer of as many parameters.

Both read the demo's text, batch by batch in turn:

python -m examples.moeut
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from examples.language_model import data, report, train
from examples.language_model.arguments import positive, seed
from examples.language_model.configs import DEMO, Config
from examples.language_model.model import Attention, ByteModel
from examples.language_model.variants import build
from sparse_ffn.layers import SwitchHeadAttention

FFN_BALANCE, ATTENTION_BALANCE = 1e-2, 1e-3


class PeriBlock(nn.Module):
    """A layer norm before what ends in a softmax or sigmoid, and none on the way of the residual (2405.16039, 2.4)."""

    def __init__(self, d_model: int, attention: SwitchHeadAttention, ffn: sf.SigmaMoE, dropout: float) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.attention, self.ffn = attention, ffn
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), value_input=x))
        x = x + self.dropout(self.ffn(x, router_input=self.ffn_norm(x)))
        return x


class SharedTransformer(ByteModel):
    """A group of layers, applied n_layers / group times; as many experts as `n_parameters` allow."""

    def __init__(self, config: Config, group: int, n_parameters: int) -> None:
        super().__init__(config.d_model, config.context)
        if config.n_layers % group:
            raise SystemExit(f"--group {group} does not divide the {config.n_layers} layers of {config.name}")
        self.repeats = config.n_layers // group
        shared = {"n_layers": config.n_layers, "balance_over": "sequence"}

        def attention(n_experts: int) -> SwitchHeadAttention:
            heads = {"n_heads": max(1, config.n_heads // 2), "d_head": config.d_head}
            return SwitchHeadAttention(
                config.d_model, n_experts=n_experts, k=2, **heads, balance_weight=ATTENTION_BALANCE, **shared
            )

        def ffn(n_experts: int) -> sf.SigmaMoE:
            sizes = (config.d_model, n_experts, config.expert_size, config.experts_k)
            return sf.SigmaMoE(*sizes, balance_weight=FFN_BALANCE, **shared)

        dense = Attention(config.d_model, config.n_heads, config.d_head, config.context, config.n_layers)
        heads = fitting(attention, 2, self.repeats * count(dense))
        rest = n_parameters - count(self) - group * (count(attention(heads)) + 4 * config.d_model)  # and norms
        experts = fitting(ffn, config.experts_k, rest // group)
        self.blocks = nn.ModuleList(
            PeriBlock(config.d_model, attention(heads), ffn(experts), config.dropout) for _ in range(group)
        )

    @property
    def ffns(self) -> list[nn.Module]:
        return super().ffns * self.repeats

    def body(self, x: Tensor) -> Tensor:
        with sf.pooled_balance(self) if self.training else nullcontext():  # one loss for all uses of a layer
            for _ in range(self.repeats):
                x = super().body(x)
        return x


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def fitting(make: Callable[[int], nn.Module], least: int, n_parameters: int) -> int:
    """The largest number of experts with at most so many parameters."""
    base = count(make(least))
    return least + max(0, n_parameters - base) // (count(make(least + 1)) - base)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.moeut", description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=positive, default=DEMO.steps, help=f"of training (default: {DEMO.steps})")
    parser.add_argument(
        "--group", type=positive, default=2, help=f"layers that {DEMO.n_layers} are made of (default: 2)"
    )
    parser.add_argument("--data", default="python", help="as the demo's")
    parser.add_argument("--seed", type=seed, default=0, help="of weights and batches (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("runs/moeut"), help="folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, tuple[int, float]]:
    """Returns parameters and bits per byte of the test text, of both."""
    args = parse(argv)
    config = DEMO.with_steps(args.steps)
    args.out.mkdir(parents=True, exist_ok=True)
    try:
        corpus = data.load(args.data, config.context)
    except data.DataError as error:
        raise SystemExit(f"error: {error}") from error
    dense = build("dense", config, args.seed)
    torch.manual_seed(args.seed)
    models: dict[str, ByteModel] = {"dense": dense, "MoEUT": SharedTransformer(config, args.group, count(dense))}
    learners = [train.make_learner(name, model, config) for name, model in models.items()]
    about = {"moeut": args.group, "steps": config.steps, "data": corpus.digest, "seed": args.seed}
    checkpoint, first = args.out / "checkpoint.pt", 0
    if args.resume:
        try:
            first = train.load_checkpoint(checkpoint, about, learners)
        except train.TrainingError as error:
            raise SystemExit(f"error: {error}") from error
    steps = train.train(learners, corpus, config, seed=args.seed, first_step=first, checkpoint=checkpoint, about=about)
    for done, bits in steps:
        if done % 10 == 0:
            print(f"step {done}: " + ", ".join(f"{name} {value:.3f}" for name, value in bits.items()), flush=True)
    results = report.measure(learners, corpus, config)
    print(f"\ntext: {corpus.name}, unigram entropy {corpus.unigram_entropy():.2f} bits per byte")
    for name, result in results.items():
        bits = ", ".join(f"{part} {value:.3f}" for part, value in result["bits_per_byte"].items())
        print(
            f"{name:5}  {result['parameters']:,} parameters, FFN FLOPs {result['ffn_flops_relative']:.0%} of dense, "
            f"step time {result['step_time_relative']:.2f} of dense, bits per byte: {bits}"
        )
    for name, stats in results["MoEUT"]["routing"].items():
        print(f"{name}: entropy of the load {stats['entropy']:.2f}, busiest {stats['busiest']:.0%}")
    return {name: (result["parameters"], result["bits_per_byte"]["test"]) for name, result in results.items()}


if __name__ == "__main__":
    main()
