"""Train a converted Hugging Face model with the Trainer; the balance loss acts without a change to the training loop.

python examples/train_with_trainer.py
"""

from __future__ import annotations

import argparse
import inspect
import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import sparse_ffn as sf
from sparse_ffn.integrations.transformers import from_pretrained, record_conversion


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (default 150)")
    parser.add_argument("--text", help="a text file to learn; default the source of Python's own argparse module")
    parser.add_argument("--out", help="folder for the trained model; default a temporary one")
    return parser.parse_args(argv)


def windows(path: str | None, length: int = 64) -> list[dict[str, Tensor]]:
    """A text as bytes, cut into windows."""
    if path is None:
        raw = inspect.getsource(argparse).encode()
    else:
        with open(path, "rb") as file:
            raw = file.read()
    rows = [row for row in torch.tensor(list(raw)).split(length) if len(row) == length]
    if len(rows) < 2:
        raise SystemExit(f"error: {path} has {len(raw)} bytes, and at least {2 * length} are needed")
    return [{"input_ids": row, "labels": row} for row in rows]


def main(argv: Sequence[str] | None = None) -> tuple[float, float]:
    """Returns the loss on held-out text before and after training."""
    args = parse(argv)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=256, n_positions=64, n_embd=64, n_layer=2, n_head=4,
                                       bos_token_id=0, eos_token_id=0))  # fmt: skip
    # aux="inject": the balance loss adds its own gradient in the backward pass, so that the Trainer need not know it
    config = sf.SigmaMoEConfig(n_experts=8, k=2, init="fresh", n_layers=2, aux="inject", balance_weight=1e-2)
    report = sf.sparsify_(model, config)
    print(report)
    record_conversion(model, report)

    data = windows(args.text)
    n_test = max(1, len(data) // 10)
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.out or temporary
        options = TrainingArguments(
            folder, max_steps=args.steps, learning_rate=3e-3, per_device_train_batch_size=16, save_strategy="no",
            report_to="none", logging_steps=50, disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        trainer = Trainer(model, options, train_dataset=data[:-n_test], eval_dataset=data[-n_test:])
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        after = trainer.evaluate()["eval_loss"]
        trainer.save_model(folder)
        from_pretrained(folder)
    print(f"held-out loss {before:.3f} -> {after:.3f} nats a byte")
    for name, stats in sf.routing_stats(model).items():
        print(f"{name}: entropy of the load {stats['entropy']:.3f}, busiest expert {stats['busiest']:.1%}")
    return before, after


if __name__ == "__main__":
    main()
