"""Real text without a download: docstrings of installed packages."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterable, Iterator

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


def docstrings(modules: Iterable[str]) -> list[str]:
    """The docstrings of what is public in Python modules, its methods included: each text once, in order.

    Args:
        modules: their names.
    """
    return list(dict.fromkeys(text for name in modules for text in _of(importlib.import_module(name))))


def pairs(modules: Iterable[str], limit: int) -> list[tuple[str, str]]:
    """Docstrings of Python modules, each cut into its first paragraph and the text after it.

    Args:
        modules: their names.
        limit: most pairs, spread evenly over all that there are.
    """
    found: dict[str, str] = {}
    for text in docstrings(modules):
        head, _, rest = (" ".join(part.split()) for part in text.partition("\n\n"))
        if 20 <= len(head) <= 200 and len(rest) >= 80:
            found.setdefault(head, rest[:600])
    every = list(found.items())
    return [every[i * len(every) // limit] for i in range(limit)] if len(every) > limit else every


def _of(module: object) -> Iterator[str]:
    for name, value in sorted(vars(module).items()):
        if not name.startswith("_") and callable(value):
            members = sorted(vars(value).items()) if isinstance(value, type) else []
            for each in (value, *(m for n, m in members if not n.startswith("_") and inspect.isroutine(m))):
                if text := inspect.getdoc(each):
                    yield text
