"""Calibration: a uniform sample, in bounded memory, of what the FFNs of a model see on real batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_function, check_module, check_positive
from sparse_ffn.convert.batches import Batches, first_of, run
from sparse_ffn.convert.find.examples import Examples
from sparse_ffn.convert.find.find import find
from sparse_ffn.convert.find.found import Found

Filter = Callable[[nn.Module, str], bool]


class Reservoir:
    """A uniform sample of at most ``size`` of the rows that went by."""

    def __init__(self, size: int) -> None:
        self.size, self.seen = size, 0
        self._generator = torch.Generator().manual_seed(0)
        self._rank = torch.empty(0, device="cpu")
        self.rows = torch.empty(0, 0, device="cpu")
        """The sample [at most size, width], on the CPU, in the order in which the rows came."""

    def add(self, rows: Tensor) -> None:
        """Let rows [n, width] go by."""
        rows = rows.detach()
        self.seen += len(rows)
        # every row draws a number, and the largest stay: no row's chance depends on when it came
        drawn = torch.rand(len(rows), generator=self._generator, dtype=torch.float64, device="cpu")
        rank = torch.cat([self._rank, drawn])
        kept = rank.topk(min(self.size, len(rank))).indices.sort().values
        old = len(self._rank)
        new = rows[(kept[kept >= old] - old).to(rows.device)].cpu()
        self.rows = torch.cat([self.rows[kept[kept < old]], new]) if old else new
        self._rank = rank[kept]


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Any],
    filter_fn: Filter | None = None,
    *,
    max_tokens: int = 4096,
    example_inputs: Any = None,
) -> dict[str, Tensor]:
    """Run a model on batches and keep a sample of what each of its FFNs gets.

    Args:
        model: before ``sparsify_``. It runs in evaluation mode, and its modes are as before afterwards.
        batches: each a mapping (keyword arguments), a tuple or list (positional arguments), or one argument. Tokens
            that a mapping's ``attention_mask`` [batch, length] marks as padding are left out, or its
            ``decoder_attention_mask`` in the decoder of an encoder-decoder of transformers.
        filter_fn: as ``sparsify_``'s: only these FFNs.
        max_tokens: rows kept for each FFN, a uniform sample.
        example_inputs: as ``sparsify_``'s; None for the first batch.

    Returns:
        By name, what ``sparsify_(calibration=...)`` takes: [at most max_tokens, d_model] on the CPU. An FFN that saw no
        token is left out, and has to be left out of ``sparsify_`` too.

    Raises:
        TypeError: the model is no module, ``batches`` cannot be iterated over, or ``filter_fn`` is no function.
        ValueError: no FFN is found, or none saw a token; a lazy module has not run yet.
    """
    max_tokens = check_positive("max_tokens", max_tokens)
    if filter_fn is not None:
        check_function("filter_fn", filter_fn, "module and name")
    check_module("model", model)
    batches = Batches(batches)
    if example_inputs is None:
        example_inputs = next(iter(batches.first), None)
    every = find(model, Examples(model, example_inputs))[0]
    found = [f for f in every if filter_fn is None or filter_fn(f.module, f.name)]
    if not found:
        raise ValueError("the model has no FFN that sparsify_ would find (and filter_fn admit)")
    return sample(model, found, batches, max_tokens)


def sample(model: nn.Module, found: list[Found], batches: Iterable[Any], max_tokens: int = 4096) -> dict[str, Tensor]:
    """What FFNs of a model get on batches: ``calibrate`` of those that are found."""
    samples = {f.name: Reservoir(max_tokens) for f in found}

    def keep(sample: Reservoir, args: tuple[Any, ...], kwargs: dict[str, Any], mask: Tensor | None) -> None:
        x: Tensor = first_of(args, kwargs)
        rows = x.reshape(-1, x.shape[-1])
        sample.add(rows if mask is None else rows[mask])

    run(model, batches, [(f.ups[0].module, partial(keep, samples[f.name])) for f in found])
    seen = {name: sample.rows for name, sample in samples.items() if sample.seen}
    if not seen:
        raise ValueError(f"no FFN saw a token of the batches: {', '.join(samples)}")
    return seen
