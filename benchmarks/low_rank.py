"""What compress_experts_ costs a byte language model: experts that were trained from the start, and upcycled ones.

Other ways to make the same models smaller stand beside it.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # to run as a script, too

import sparse_ffn as sf
from benchmarks.pretrained.byte_model import FOLDER, LAYERS, ByteModel, fresh, train, trained
from sparse_ffn.compress import compress_experts_

N_EXPERTS, D_FF, K = 8, 256, 2
BAR = 0.02
"""Most bits per byte that upcycled experts may lose at a rank of a quarter of their units."""


def upcycled(whole: ByteModel, steps: int, more: int, seed: int) -> ByteModel:
    """A dense model of so many steps whose FFNs became copies in mixtures, trained for some steps more."""
    model = fresh(lambda: sf.DenseFFN(128, D_FF, n_layers=LAYERS), seed)
    train(model, whole.corpus, steps, seed)
    sf.sparsify_(model, sf.SoftmaxMoEConfig(init="upcycle", n_experts=N_EXPERTS, k=K))
    train(model, whole.corpus, more, seed + 1, rate=1e-3)
    return ByteModel(model, whole.corpus)


def costs(whole: ByteModel, ranks: Sequence[int], n_windows: int) -> dict[int, tuple[float, float]]:
    """For each rank the experts' parameters, as a share of what they were, and the bits per byte that it costs."""
    before, found = whole.bits_per_byte(whole.model, n_windows), {}
    for rank in ranks:
        small = copy.deepcopy(whole.model)
        layers = compress_experts_(small, rank).layers
        share = sum(of.parameters[1] for of in layers) / sum(of.parameters[0] for of in layers)
        found[rank] = share, whole.bits_per_byte(small, n_windows) - before
    return found


def others(whole: ByteModel, n_windows: int) -> dict[str, float]:
    """The bits per byte that pruning and quantising cost the same model."""
    before, stats, found = whole.bits_per_byte(whole.model, n_windows), None, {}
    for keep in (0.75, 0.5):
        stats = stats or sf.expert_stats(whole.model, whole.calibration())
        small = copy.deepcopy(whole.model)
        sf.prune_experts_(small, stats, keep, replace="mean")
        found[f"{keep:.0%} of the experts kept"] = whole.bits_per_byte(small, n_windows) - before
    for bits in (8, 4):
        small = copy.deepcopy(whole.model)
        sf.quantize_experts_(small, sf.ExpertQuantization(bits=bits))
        found[f"{bits} bits"] = whole.bits_per_byte(small, n_windows) - before
    return found


def main(argv: Sequence[str] | None = None) -> dict[str, dict[int, tuple[float, float]]]:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500, help="of the first training, of either model")
    parser.add_argument("--more", type=int, default=200, help="steps after upcycling")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--windows", type=int, default=128, help="of the validation text")
    parser.add_argument("--data", default="python", help="'python', 'enwik8' or the path of a file")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the trained models")
    options = parser.parse_args(argv)
    scratch = trained(options.steps, options.seed, options.folder, options.data)
    copies = upcycled(scratch, options.steps, options.more, options.seed)
    found = {}
    for name, model, size in (("trained from the start", scratch, 32), ("upcycled", copies, D_FF)):
        before = model.bits_per_byte(model.model, options.windows)
        print(f"{name}, experts of {size} units: {before:.4f} bits per byte", flush=True)
        found[name] = costs(model, (size // 2, size // 4, size // 8), options.windows)
        for rank, (share, more) in found[name].items():
            judged = ""
            if name == "upcycled" and rank == size // 4:
                judged = f"  {'holds' if more <= BAR else 'misses'} the bar of {BAR:+.2f}"
            print(f"  rank {rank:3}: {share:6.1%} of the parameters, {more:+.4f}{judged}", flush=True)
        for way, more in others(model, options.windows).items():
            print(f"  {way}: {more:+.4f}", flush=True)
    return found


if __name__ == "__main__":
    main()
