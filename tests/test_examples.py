"""The small examples run, in small form, and do what they say."""

from __future__ import annotations

from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")


from examples import (
    convert_hf,
    moeut,
    quantize_moe,
    serve_with_compile,
    swap_sequential,
    train_parallel,
    train_with_trainer,
)

EXAMPLES = (convert_hf, moeut, quantize_moe, serve_with_compile, swap_sequential, train_parallel, train_with_trainer)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.__name__.rpartition(".")[2])
def test_help_says_what_it_is_for(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        example.main(["--help"])
    assert str(example.__doc__).splitlines()[0][:40] in capsys.readouterr().out


def test_all_small_examples_are_tested() -> None:
    folder = Path(swap_sequential.__file__).parent
    assert {f.stem for f in folder.glob("*.py")} - {"__init__"} == {e.__name__.rpartition(".")[2] for e in EXAMPLES}


def test_swap_sequential() -> None:
    errors = swap_sequential.main(["--steps", "100", "--k", "16", "4"])
    dense = errors[0][0]
    assert errors[16][0] == pytest.approx(dense, rel=1e-3)  # all experts: the dense model
    assert errors[4][0] > 1.1 * dense  # a quarter of them: something is missing
    assert errors[4][1] < errors[4][0]  # training brings some of it back


def test_convert_hf(tmp_path: Path) -> None:
    assert convert_hf.main(["--out", str(tmp_path / "exact")]) < 1e-5
    convert_hf.load(None).save_pretrained(tmp_path / "given")
    assert convert_hf.main(["--model", str(tmp_path / "given"), "--k", "4"]) > 1e-4


def test_train_with_trainer(tmp_path: Path) -> None:
    before, after = train_with_trainer.main(["--steps", "20", "--out", str(tmp_path)])
    assert after < before - 1
    assert (tmp_path / "config.json").is_file()


@pytest.mark.exhaustive
def test_moeut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"d_model": 32, "n_heads": 2, "d_head": 16, "d_ff": 128, "expert_size": 8, "context": 16, "batch_size": 8}
    small = {"evaluations": 1, "eval_windows": 8, "final_windows": 8}
    monkeypatch.setattr(moeut, "DEMO", replace(moeut.DEMO, **sizes, **small))
    (tmp_path / "text").write_bytes(Path(moeut.__file__).read_bytes() * 4)
    given = ["--steps", "30", "--data", str(tmp_path / "text"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="nothing to resume"):
        moeut.main([*given, "--resume"])
    found = moeut.main(given)
    assert moeut.main([*given, "--resume"]) == found  # nothing was left to train
    (dense, dense_bits), (shared, shared_bits) = found["dense"], found["MoEUT"]
    assert 0.95 * dense < shared <= dense
    assert max(dense_bits, shared_bits) < 7.5  # of 8: both have learned something


@pytest.mark.exhaustive
def test_too_little_of_anything_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "short").write_bytes(b"x" * 100)
    with pytest.raises(SystemExit, match="has 100 bytes, and at least 128 are needed"):
        train_with_trainer.main(["--text", str(tmp_path / "short")])
    with pytest.raises(SystemExit, match="error: "):
        moeut.main(["--data", str(tmp_path / "nothing"), "--out", str(tmp_path)])
    for example, name in ((serve_with_compile, "--requests"), (moeut, "--steps"), (moeut, "--group")):
        with pytest.raises(SystemExit):
            example.main([name, "0"])
        assert name in capsys.readouterr().err


def test_serve_with_compile() -> None:
    assert serve_with_compile.main(["--backend", "aot_eager", "--requests", "6", "--width", "32"]) == 1


@pytest.mark.skipif(
    tuple(map(int, version("transformers").split(".")[:2])) < (5, 23),
    reason="transformers before 5.23 saves one scale a row in a shape that cannot be loaded again",
)
def test_quantize_moe(tmp_path: Path) -> None:
    assert 0 < quantize_moe.main([]) < 0.1
    folder = tmp_path / "model"
    model = quantize_moe.made().eval()
    model.save_pretrained(folder)
    same, tokens = type(model).from_pretrained(folder).eval(), torch.arange(32).unsqueeze(0)
    assert torch.equal(same(tokens).logits, model(tokens).logits)  # so that the error is the quantiser's alone
    error = quantize_moe.main(["--model", str(folder), "--out", str(tmp_path / "smaller"), "--bits", "8"])
    assert 0 < error < 0.02
    sizes = [(where / "model.safetensors").stat().st_size for where in (folder, tmp_path / "smaller")]
    assert sizes[1] < 0.65 * sizes[0]
