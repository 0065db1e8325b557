"""Copying and running modules that may refuse."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from sparse_ffn.convert.edits import switch_off_fast_path
from sparse_ffn.convert.found import Unknown
from sparse_ffn.convert.probe import Trace, probe_copy, run

Arguments = tuple[Tensor | None, ...]


def try_copy(module: nn.Module) -> nn.Module:
    try:
        copied = probe_copy(module)
    except Exception as error:
        raise Unknown(f"{type(module).__name__} cannot be copied to probe it ({error})") from error
    for inner in copied.modules():
        switch_off_fast_path(inner)
    return copied


def try_run(
    copied: nn.Module, choices: list[Arguments], watch: Iterable[nn.Module], train: bool = False
) -> tuple[Trace, Arguments]:
    """Run with the first arguments that it takes; returns them too."""
    failed: Exception | None = None
    watch = list(watch)
    for args in choices:
        try:
            return run(copied, args, watch, train=train), args
        except Exception as error:  # noqa: PERF203
            failed = failed or error
    text = str(failed).strip().split("\n")[0]
    raise Unknown(f"{type(copied).__name__} does not run by itself ({type(failed).__name__}: {text})")
