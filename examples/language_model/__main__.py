"""Command line: trains the same byte transformer with each FFN and writes a table, a picture and a JSON."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparse_ffn import info
from sparse_ffn.backends.warning import how_to_install

from . import data
from .arguments import positive, seed
from .configs import CONFIGS
from .variants import VARIANTS, build


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no device torch knows") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("torch sees no CUDA device; leave --device out to train on the CPU")
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r}: only cpu and cuda are supported")
    return found


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.language_model",
        description="Train a byte-level transformer with a plain FFN and with each sparse one, at equal parameters.",
    )
    add = parser.add_argument
    add("--config", choices=CONFIGS, default="demo", help="demo (default) for CPUs; the paper's own sizes for GPUs")
    add("--data", default="python", help="python (default: its documentation and library), enwik8 (fetched) or a file")
    add("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="what to compare (default: all)")
    add("--steps", type=positive, help="instead of the configuration's number")
    add("--seed", type=seed, default=0, help="of weights, batches and dropout (default: 0)")
    add("--device", type=device, default="cpu", help="cpu (default), or cuda, with bfloat16 autocast")
    add("--threads", type=positive, help="CPU threads (default: torch decides)")
    add("--out", type=Path, help="folder for the results (default: runs/CONFIG)")
    add("--resume", action="store_true", help="go on from the checkpoint in the folder")
    return parser.parse_args(arguments)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm  # type: ignore[import-untyped]

    from . import picture, report, train  # after the check that their packages are there

    if args.threads:
        torch.set_num_threads(args.threads)
    config = CONFIGS[args.config]
    if args.steps:
        config = config.with_steps(args.steps)
    out: Path = args.out or Path("runs") / config.name
    out.mkdir(parents=True, exist_ok=True)
    variants = list(dict.fromkeys(args.variants))

    corpus = data.load(args.data, config.context)
    unigram = corpus.unigram_entropy()
    backend = info.chosen(args.device)
    print(f"text     {corpus.name}, {corpus.n_bytes:,} bytes, unigram entropy {unigram:.2f} bits per byte")
    print(f"compute  {backend}, {torch.get_num_threads()} CPU threads")

    learners = [train.make_learner(name, build(name, config, args.seed).to(args.device), config) for name in variants]
    about: dict[str, Any] = {
        "config": asdict(config),
        "data": corpus.digest,
        "seed": args.seed,
        "variants": variants,
    }
    checkpoint = out / "checkpoint.pt"
    first_step = train.load_checkpoint(checkpoint, about, learners) if args.resume else 0
    if checkpoint.exists() and not args.resume:
        print(f"note     starting anew: {checkpoint} will be replaced (--resume would go on from it)")
    print(f"train    {', '.join(variants)}: {config.steps} steps of {config.batch_size} x {config.context} bytes each")
    steps = train.train(
        learners, corpus, config, seed=args.seed, first_step=first_step, checkpoint=checkpoint, about=about
    )
    with tqdm(total=config.steps, initial=first_step, unit="step", dynamic_ncols=True) as bar:
        for _, bits in steps:
            bar.set_postfix({name: f"{value:.2f}" for name, value in bits.items()}, refresh=False)
            bar.update()

    results = report.measure(learners, corpus, config)
    table = report.table(results)
    moe = next((learner.model for learner in learners if learner.variant == "moe"), None)
    title = f"{config.name} on {Path(corpus.name).name}: {config.steps} steps"
    picture.draw(out / "results.png", title, results, unigram, moe)
    everything = {
        **about,
        "data": {"name": corpus.name, "md5": corpus.digest, "bytes": corpus.n_bytes, "unigram_entropy": unigram},
        "device": str(args.device),
        "threads": torch.get_num_threads(),
        "backend": backend,
        "environment": info.report().splitlines(),
        "variants": results,
        "table": table,
    }
    (out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
    print(f"\n{table}\n\nunigram entropy of the validation text: {unigram:.2f} bits per byte")
    print(f"written: {out / 'results.png'}, {out / 'results.json'}")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    missing = [name for name in ("matplotlib", "tqdm") if importlib.util.find_spec(name) is None]
    if missing:
        print(f"error: {' and '.join(missing)} missing: {how_to_install('demo')}", file=sys.stderr)
        return 2
    from .train import TrainingError

    try:
        run(args)
    except (data.DataError, TrainingError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; --resume goes on from the last checkpoint, if there is one yet", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
