"""How many hidden units the dense FFNs use: what the paper takes for a sign that sparse layers can stand for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from examples.language_model import data
from examples.language_model.configs import Config
from examples.language_model.train import Learner


@torch.no_grad()
def active_units(learner: Learner, corpus: data.Corpus, config: Config) -> list[float]:
    """Units above zero for a byte, the mean over a batch from all over the validation part, of each FFN with a ReLU."""
    counts: list[float] = []

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append((output > 0).sum(-1).float().mean().item())

    found = [module for ffn in learner.model.ffns for module in ffn.modules() if isinstance(module, nn.ReLU)]
    hooks = [module.register_forward_hook(count) for module in found]
    x, _ = data.windows(corpus.valid, data.even_starts(corpus.valid, config.batch_size, config.context), config.context)
    try:
        with learner.autocast():
            learner.model.eval()(x.to(learner.device))
    finally:
        for hook in hooks:
            hook.remove()
    return counts
