"""The sizes of the study: the models, how long they learn, with which layers."""

from __future__ import annotations

from dataclasses import dataclass, replace

from examples.language_model.configs import E8, Config

from .variants import VARIANTS


@dataclass(frozen=True)
class Size:
    """A model's size, and the runs that make it complete."""

    config: Config
    variants: tuple[str, ...]
    tune: bool = True
    """Takes the learning rate that the study chooses, instead of the configuration's."""
    needs_gpu: bool = False


# Less than a pass through the text, so that nothing needs dropout. Two wide heads cost less than four narrow ones.
S = Config(
    name="S",
    d_model=128,
    n_layers=4,
    n_heads=2,
    d_head=64,
    d_ff=512,
    context=256,
    dropout=0.0,
    n_experts=16,
    expert_size=32,
    experts_k=4,
    expert_dropout=0.0,
    balance_weight=1e-3,
    topk_k=128,
    pkm_k=32,
    pkm_heads=4,
    batch_size=16,
    steps=4883,  # of 4096 bytes: 20 MB
    warmup=200,
    learning_rate=2e-3,
    grad_clip=1.0,
    bf16=True,
    evaluations=20,
    eval_windows=256,
    final_windows=4096,
    checkpoints=40,
)
M = replace(
    S, name="M", d_model=256, n_layers=6, n_heads=4, d_ff=1024, expert_size=64, topk_k=256, steps=7325, checkpoints=80
)
# The paper's Enwik8 model with its own settings, learning rate included, and a fifth of its steps.
L = replace(E8, name="L", steps=20_000, evaluations=20, checkpoints=80)

CORE = ("dense", "sigma", "topk-16", "pkm", "switch")
SIZES: dict[str, Size] = {
    "S": Size(S, tuple(VARIANTS)),
    "M": Size(M, CORE),
    "L": Size(L, CORE, tune=False, needs_gpu=True),
}
