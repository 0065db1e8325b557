"""What conversion does to a real decoder: loss, recovery by fine-tuning and speed, cell by cell, and their tables."""

from __future__ import annotations

import copy
import math
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

import sparse_ffn as sf
from benchmarks.measuring.timing import Run, race
from benchmarks.pretrained.cells import Cell, Numbers, Record
from benchmarks.pretrained.decoder import SMOLLM2, Decoder, Sizes, Text, losses, tune, with_own
from sparse_ffn.convert import FFNConfig

DENSE = "dense"
RATE = 2e-4  # of fine-tuning


@dataclass(frozen=True)
class Method:
    """A row of the tables.

    Attributes:
        name: its first column.
        config: what ``sparsify_`` gets for a percentage of active units.
        k: of that percentage, where nothing else depends on it: all percentages are then converted at once.
        calibrated: whether it also gets calibration, and so has an error bar.
        shared_out: whether that is the batches themselves, so that the FFNs share out the active units.
        shares: percentages of active units.
        tuned: those of them at which it is fine-tuned.
        timed: those of them at which it is timed; None for all.
    """

    name: str
    config: Callable[[int], FFNConfig | Mapping[str, FFNConfig]]
    k: Callable[[int], int] | None = None
    calibrated: bool = True
    shared_out: bool = False
    shares: Sequence[int] = (75, 50, 25)
    tuned: Sequence[int] = ()
    timed: Sequence[int] | None = None

    def cell(self, share: int, sample: int) -> str:
        """What its cell for a share and a sample of calibration text is called."""
        return f"{self.name}, {share}%" + (f", sample {sample}" if self.calibrated else "")

    def cells(self, share: int) -> list[str]:
        """Those of all samples."""
        return [self.cell(share, sample) for sample in range(Sizes.samples if self.calibrated else 1)]


def k_of(n: int) -> Callable[[int], int]:
    """From percentages to numbers out of n."""
    return lambda share: n * share // 100


def experts(d_ff: int, share: int) -> FFNConfig:
    """Of 64 units, clustered, behind an open router that nothing moves."""
    n = d_ff // 64
    return sf.MoEConfig(router="unweighted", balance="none", init="cluster", n_experts=n, k=k_of(n)(share))


def beside(d_ff: int, share: int) -> FFNConfig:
    """Three quarters of the active units are a shared expert's. Routers rank; values make up for what is left out.

    These parts and experts of 16 lost least on calibration text of the first decoder, a quarter of it kept back.
    """
    return sf.MoEConfig(
        router="unweighted", balance="none", init="cluster", router_init="ranked", refit=True, bias=True,
        expert_size=16, active=share / 100, shared_size=16 * k_of(d_ff * 3 // 64)(share),
    )  # fmt: skip


def auto(share: int) -> FFNConfig:
    """What each FFN's own calibration says."""
    return sf.MoEConfig(router="unweighted", balance="none", init="auto", expert_size=16, active=share / 100)


def units(d_ff: int, share: int) -> FFNConfig:
    """The largest hidden units, and no router."""
    return sf.TopKFFNConfig(k=k_of(d_ff)(share))


def methods(d_ff: int) -> tuple[Method, ...]:
    """Those of the tables, for FFNs of d_ff units.

    Another way to convert is another line.
    """
    some, every = k_of(d_ff // 64), k_of(d_ff)
    usable = (75, 50)  # with a quarter experts lose so much that one trains on, or takes TopKFFN
    return (
        Method("experts of 64, not calibrated", partial(experts, d_ff), some, calibrated=False, timed=()),
        Method("experts of 64, calibrated", partial(experts, d_ff), some, tuned=(50, 25)),
        Method("experts of 16 and a shared one, calibrated", partial(beside, d_ff), tuned=(50, 25)),
        Method("the same, units shared out", partial(beside, d_ff), shared_out=True, shares=usable, timed=()),
        Method('`init="auto"`, experts of 16, units shared out', auto, shared_out=True, shares=usable, timed=()),
        Method("TopKFFN", partial(units, d_ff), every, calibrated=False, shares=(75, 50, 25, 10), tuned=(25, 10)),
    )


METHODS = methods(SMOLLM2.d_ff)


class Decoding:
    """The decoder, its text, and the cells of each table. What finished cells do not need is never loaded."""

    def __init__(
        self,
        sizes: Sizes = Sizes(),  # noqa: B008, it is frozen
        methods: Sequence[Method] = METHODS,
        load: Callable[[], Decoder] = SMOLLM2.load,
        name: str = SMOLLM2.name,
    ) -> None:
        self.sizes, self.methods, self._load, self._name = sizes, methods, load, name

    @cached_property
    def decoder(self) -> Decoder:
        """The dense model and its tokenizer."""
        return self._load()

    @cached_property
    def text(self) -> Text:
        """All that is read."""
        return self.decoder.text(self.sizes)

    @cached_property
    def dense(self) -> Tensor:
        """The dense model's loss on each held-out piece."""
        return losses(self.decoder.model, self.text.held_out)

    def settings(self, *names: str) -> dict[str, str]:
        """What numbers depend on, in words; ``names`` pick some of it."""
        sizes = self.sizes
        tokens = {name: getattr(sizes, name) * sizes.length for name in ("held_out", "calibration", "training")}
        steps = sizes.training
        said = {
            "model": self._name,
            "held-out text": f"{tokens['held_out']} tokens of docstrings of the standard library of Python "
            f"{platform.python_version()}, {sizes.length} at a time",
            "calibration": f"up to {sizes.samples} samples of {tokens['calibration']} tokens of docstrings of other "
            "modules",
            "fine-tuning": f"{steps} steps on {tokens['training']} tokens of those other modules, AdamW, learning rate "
            f"{RATE:g} after five steps and falling linearly to zero; routers do not learn",
            "timed": f"one token after {sizes.length - 1} and a prompt of {sizes.length}, in fp32, in transformers",
        }
        return {name: said[name] for name in names}

    def quality(self) -> Iterator[Cell]:
        """Loss over the dense model's; all of a sample before the next, so that a run cut short has fewer samples."""
        yield Cell(DENSE, lambda: {"loss": self.dense.mean().item()})
        yield from self._converted(lambda method: method.shares, self._loss)

    def recovery(self) -> Iterator[Cell]:
        """Loss before and after fine-tuning, on the same text in the same order."""
        yield Cell(DENSE, lambda: self._tuned(self.decoder.model))
        yield from self._converted(lambda method: method.tuned, self._tuned)

    def speed(self, seconds: float) -> Iterator[Cell]:
        """Time over the dense model's, which takes turns with it for so many seconds a cell.

        A little text calibrates: how it is dealt out hardly matters to the time.
        """
        times = partial(self._times, seconds=seconds)
        yield from self._converted(_timed, times, samples=1, n_pieces=4)

    def _converted(
        self,
        shares: Callable[[Method], Sequence[int]],
        measure: Callable[[nn.Module], Numbers],
        samples: int | None = None,
        n_pieces: int | None = None,
    ) -> Iterator[Cell]:
        """A cell for each method, share and sample, with what is measured of the converted model."""
        for sample in range(samples or self.sizes.samples):
            batches = cache(partial(self._calibration, sample, n_pieces))
            calibration = cache(partial(self._calibrate, batches))
            for method in self.methods:
                convert = cache(partial(self._convert, method, batches if method.shared_out else calibration))
                for share in shares(method) if method.calibrated or sample == 0 else ():
                    yield Cell(method.cell(share, sample), partial(_measured, convert, method, share, measure))

    def _calibration(self, sample: int, n_pieces: int | None) -> list[dict[str, Tensor]]:
        return [{"input_ids": some} for some in self.text.calibration[sample][:n_pieces].split(4)]

    def _calibrate(self, batches: Callable[[], Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
        # the FFNs see the same where logits of one token are computed instead of all
        return sf.calibrate(self.decoder.model, [{**batch, "logits_to_keep": 1} for batch in batches()])

    def _convert(self, method: Method, calibration: Callable[[], Any], share: int) -> nn.Module:
        """A copy whose FFNs are its own, and converted."""
        model = with_own(self.decoder.model, ".mlp.")
        sf.sparsify_(model, method.config(share), calibration=calibration() if method.calibrated else None)
        return model

    def _loss(self, model: nn.Module) -> Numbers:
        over = losses(model, self.text.held_out) - self.dense
        return {"over dense": over.mean().item(), "error of the text": over.std().item() / math.sqrt(len(over))}

    def _tuned(self, model: nn.Module) -> Numbers:
        before = losses(model, self.text.held_out).mean().item()
        model = copy.deepcopy(model)  # it shares nothing any more
        tune(model, self.text.training, RATE)
        return {"before": before, "after": losses(model, self.text.held_out).mean().item()}

    @torch.no_grad()
    def _times(self, model: nn.Module, seconds: float) -> Numbers:
        """Of a prompt, and of one token after it."""
        prompt, found = self.text.held_out[:1], {}
        models = {DENSE: self.decoder.model, "converted": model}
        for name, run in (("decode", decode), ("prefill", _prefill)):
            samples = race({name: run(each, prompt) for name, each in models.items()}, seconds / 2, lead=[DENSE])
            found[name] = samples.ratio("converted", DENSE).median
            found[f"{name} of dense"] = samples.time(DENSE).median
        return found


def _timed(method: Method) -> Sequence[int]:
    return method.shares if method.timed is None else method.timed


def _measured(
    convert: Callable[[int], nn.Module], method: Method, share: int, measure: Callable[[nn.Module], Numbers]
) -> Numbers:
    if method.k is None:
        return measure(convert(share))
    model = convert(method.shares[0])
    for layer in model.modules():
        if isinstance(layer, (sf.MoE, sf.TopKFFN)):
            layer.k = method.k(share)
    return measure(model)


def _prefill(model: nn.Module, prompt: Tensor) -> Run:
    return Run(lambda: None, lambda: model(input_ids=prompt, use_cache=True, logits_to_keep=1))


def decode(model: nn.Module, prompt: Tensor) -> Run:
    """The last token [1, n] after the others; each call appends to a cache of its own."""
    filled = model(input_ids=prompt[:, :-1], use_cache=True).past_key_values
    now = [filled]

    def prepare() -> None:
        now[0] = copy.deepcopy(filled)

    return Run(prepare, lambda: model(input_ids=prompt[:, -1:], past_key_values=now[0], use_cache=True))


def quality_table(record: Record, methods: Sequence[Method] = METHODS) -> list[str]:
    """Nats over the dense model's loss."""

    def over(method: Method, share: int) -> str | None:
        found = record.of(method.cells(share), "over dense")
        return found and f"{found:+.3f}"

    dense = record.cells[DENSE]["loss"]
    errors = [cell["error of the text"] for name, cell in record.cells.items() if name != DENSE]
    return [
        *_by_share(methods, over),
        "",
        f"The dense model's loss is {dense:.3f}. Over the pieces of held-out text these differences have a standard",
        f"error of {median(errors):.3f} in the median, and at most {max(errors):.3f}.",
        f"Samples of calibration text: {_samples(record, methods)}.",
    ]


def _samples(record: Record, methods: Sequence[Method]) -> str:
    return record.finished(method.cells(share) for method in methods if method.calibrated for share in method.shares)


def recovery_table(record: Record, methods: Sequence[Method] = METHODS) -> list[str]:
    """Loss before and after fine-tuning."""
    dense = record.cells[DENSE]
    lines = [
        "| | active | before | after | over the tuned dense model |",
        "|---|---:|---:|---:|---:|",
        f"| {DENSE} | 100% | {dense['before']:.3f} | {dense['after']:.3f} | |",
    ]
    for method in methods:
        for share in method.tuned:
            before, after = (record.of(method.cells(share), number) for number in ("before", "after"))
            if before is not None and after is not None:
                over = after.mean - dense["after"]
                lines.append(f"| {method.name} | {share}% | {before:.3f} | {after:.3f} | {over:+.3f} |")
    said = "± is over samples of calibration text alone: held-out text and order of training are the same in all."
    return [*lines, "", said]


def speed_table(record: Record, methods: Sequence[Method] = METHODS) -> list[str]:
    """Time over the dense model's: of one token / of a prompt."""

    def times(method: Method, share: int) -> str | None:
        found = record.cells.get(method.cell(share, 0))
        return found and f"{found['decode']:.2f} / {found['prefill']:.2f}"

    one, many = (
        min(cell[f"{name} of dense"] for cell in record.cells.values()) * 1e3 for name in ("decode", "prefill")
    )
    return [
        *_by_share(methods, times),
        "",
        f"The dense model takes at least {one:.1f} ms a token and {many:.0f} ms for the prompt.",
    ]


def _by_share(methods: Sequence[Method], cell: Callable[[Method, int], str | None]) -> list[str]:
    shares = sorted({share for method in methods for share in method.shares}, reverse=True)
    rows = {method.name: [cell(method, share) or "" for share in shares] for method in methods}
    return [
        f"| active | {' | '.join(f'{share}%' for share in shares)} |",
        f"|---|{'---:|' * len(shares)}",
        *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items() if any(cells)),
    ]
