"""Measure the block sizes of the GPU kernels on this machine's card, and keep the best for later runs.

With --crossovers, or on a CPU, measure up to how many tokens each way of computing an expert FFN is the fastest.
Without this command built-in numbers count. What it finds lies in one JSON file for each device, and another one for
its crossovers, in $SPARSE_FFN_TUNED or, if that is not set, in sparse-ffn in the user's cache directory. Delete a file
to go back.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress

import torch

from sparse_ffn.backends import cpu, crossovers, kept
from sparse_ffn.backends.choice import unavailable
from sparse_ffn.backends.triton import columns, config, tuned
from sparse_ffn.backends.triton.tile import Tile
from sparse_ffn.backends.triton.tuned import Key
from sparse_ffn.tune import crossings
from sparse_ffn.tune.problems import KERNELS, KINDS, Problem, choices, heights, problems
from sparse_ffn.tune.search import Search, merged

LAYERS = ((512, 16, 128, 4), (1024, 64, 128, 8), (2048, 16, 1024, 8))
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def main(argv: Sequence[str] | None = None) -> int:
    """Run from the command line; 0 if all was measured or shown, 2 if nothing can be, 3 if something was not."""
    options = _options(argv)
    device: torch.device = options.device
    why = _unmeasurable(device)
    if not options.dry_run and (problem := why or kept.problem()):
        print(problem, file=sys.stderr)
        return 2
    if options.crossovers:
        return _crossovers(options)
    found = list(problems(KINDS[name] for name in options.dtype))
    if options.dry_run:
        name = "sm_90" if why else config.architecture(device)
        cache = columns.cache_bytes(torch.device("cpu") if why else options.device)
        return _show(found, name, options.kernels, cache, f"no GPU here, so for {name}" if why else f"for {name}")

    from sparse_ffn.tune.runner import DeviceRunner
    from sparse_ffn.tune.stopwatch import GPUStopwatch

    card = tuned.Card.of(device)
    entries = list(config.launchable(config.architecture(device)))
    before = tuned.load(card, entries)
    say = print if options.verbose else (lambda line: None if line.startswith("  ") else print(line, flush=True))
    search = Search(
        entries,
        DeviceRunner(device, GPUStopwatch(device)),
        cache=columns.cache_bytes(device),
        seconds=options.seconds,
        kernels=options.kernels,
        say=say,
        before=before if options.resume else None,
    )
    facts = {"torch": torch.__version__, "command": " ".join(sys.argv)}
    whole = search.run(found, lambda result: tuned.save(merged(before, result), card, **facts))
    for (kernel, kind, m, n, depth), tile in search.found.tiles.items():
        print(f"{kernel:6} {kind:5} rows {m:4} columns {n:5} depth {depth:4}: {tile}")
    for (kind, rows), height in search.found.heights.items():
        print(f"height {kind:5} rows {rows:4}: {height}")
    print(f"written to {card.path}; classes that are not listed keep the built-in tiles")
    if not whole:
        print("--resume goes on with the classes that were not reached")
    return 0 if whole else 3


def _crossovers(options: argparse.Namespace) -> int:
    """Measure where the ways cross for each layer and dtype, and keep it."""
    from sparse_ffn.tune.stopwatch import GPUStopwatch, on_the_host

    device: torch.device = options.device
    cases = list(itertools.product(options.layer or LAYERS, [DTYPES[name] for name in dict.fromkeys(options.dtype)]))
    if options.dry_run:
        counts = ", ".join(map(str, crossings.tokens(device)))
        print(
            f"Would time {', '.join(crossings.WAYS)} at {counts} tokens:", *itertools.starmap(_named, cases), sep="\n"
        )
        return 0
    ends = [time.monotonic() + options.seconds * (i + 1) / len(cases) for i in range(len(cases))]
    stopwatch = GPUStopwatch(device) if device.type == "cuda" else on_the_host
    whole = True
    for (sizes, dtype), end in zip(cases, ends, strict=True):
        print(_named(sizes, dtype))
        times = crossings.measure(sizes, dtype, device, stopwatch, end)
        whole &= len(times["sorted"]) == len(list(crossings.tokens(device)))
        if not times["sorted"]:
            print("  not measured: the time was up")
            continue
        found = crossings.choose(times)
        for n in next(iter(times.values())):
            print(f"  {n:6} tokens: " + ", ".join(f"{way} {of[n] * 1e6:.0f} µs" for way, of in times.items()))
        if not crossings.tell(times, device):
            print("  not kept: the time was up before decoding took longer than the other way")
            continue
        path = crossovers.save({crossovers.Layer.of(dtype, *sizes): found}, device)
        print(f"  decoded up to {found} tokens, in {path}")
    return 0 if whole else 3


def _named(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> str:
    D, E, G, K = sizes
    return f"d_model {D}, {E} experts of {G} units, {K} for a token, {crossovers.Layer.of(dtype, *sizes).dtype}"


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, none of which is without effect: the parser refuses those."""
    parser = _parser()
    options = parser.parse_args(argv)
    options.crossovers |= options.device.type == "cpu"
    if not options.crossovers and options.layer:
        parser.error("argument --layer: is of crossovers, which --crossovers or --device cpu measures")
    for name in ("kernels", "resume", "verbose"):
        if options.crossovers and getattr(options, name):
            parser.error(f"argument --{name}: is of block sizes, and --crossovers or --device cpu measures none")
    if options.crossovers and "tf32" in (options.dtype or ()):
        parser.error(f"argument --dtype: crossovers are of {', '.join(DTYPES)}, got tf32")
    for _, E, _, K in options.layer or ():
        if K > E:
            parser.error(f"argument --layer: K must be at most E, got K = {K} and E = {E}")
    options.dtype = options.dtype or (["bf16", "fp32"] if options.crossovers else ["bf16", "tf32", "fp32"])
    options.kernels = options.kernels or KERNELS
    return options


def _parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="python -m sparse_ffn.tune", description=__doc__)
    add = found.add_argument
    add("--device", type=_device, default="cuda", help="which GPU, default cuda")
    add("--dtype", nargs="+", choices=KINDS,
        help="default bf16 (fp16 has the same tiles), fp32 and, of tiles, tf32 (fp32 with torch's switch)")  # fmt: skip
    add("--kernels", nargs="+", choices=KERNELS,
        help="one: products of rows; two: those of a GLU; outer: gradients of the matrices. Default: all")  # fmt: skip
    add("--crossovers", action="store_true", help="measure where the ways cross; on a CPU there is nothing else")
    add("--layer", type=_size, nargs=4, action="append", metavar=("D", "E", "G", "K"),
        help="of which layer to measure the crossovers: width, experts, units of one, experts of a token; may be "
        f"repeated; default: {'; '.join(' '.join(map(str, sizes)) for sizes in LAYERS)}")  # fmt: skip
    add("--seconds", type=_seconds, default=600, help="the budget, default 600; what was measured by then is kept")
    add("--resume", action="store_true", help="go on with what earlier runs on this card have not decided")
    add("--dry-run", action="store_true", help="say what would be measured, and stop")
    add("--verbose", action="store_true", help="print every time")
    return found


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device ({str(error).splitlines()[0]})") from None


def _size(text: str) -> int:
    with suppress(ValueError):
        if int(text) > 0:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be an int > 0, got {text!r}")


def _seconds(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite number > 0, got {text!r}")


def _unmeasurable(device: torch.device) -> str | None:
    """Why nothing can be measured on a device."""
    if device.type == "cpu":
        return cpu.PROBLEM and f"there is no CPU core to measure: {cpu.PROBLEM}"
    why = _no_gpu(device)
    return why and (
        f"python -m sparse_ffn.tune measures on a GPU, and {why}. --dry-run needs none; --device cpu measures the "
        "CPU's crossovers."
    )


def _no_gpu(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{device} is none"
    return unavailable("triton", device) if torch.cuda.is_available() else "torch sees none"


def _show(found: list[Problem], name: str, kernels: Sequence[str], cache: int, where: str) -> int:
    entries, seen = list(config.launchable(name)), dict[Key, list[Tile]]()
    print(f"Would check and time ({where}):")
    for problem in found:
        print(f"{problem}, tiles of {' or '.join(map(str, heights(entries, problem)))} rows")
        for m in heights(entries, problem):
            for coordinate, large in problem.coordinates(m, cache).items():
                if coordinate[0] in kernels and coordinate not in seen:
                    seen[coordinate] = choices(entries, coordinate, large)
                    print(f"  {' '.join(map(str, coordinate))}: {' '.join(map(str, seen[coordinate]))}")
    print(f"{sum(map(len, seen.values()))} tiles in {len(seen)} classes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
