"""sparsify_: the FFNs of a model become sparse layers, in place; from_dense: one FFN becomes a layer."""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import check_changeable, check_floating, check_function, check_type, shown
from sparse_ffn.convert.batches import Batches
from sparse_ffn.convert.budget import share_out
from sparse_ffn.convert.calibrate import Filter, sample
from sparse_ffn.convert.config_base import Converted, FFNConfig
from sparse_ffn.convert.find.examples import Examples
from sparse_ffn.convert.find.find import find, find_one, without_numbers
from sparse_ffn.convert.find.found import Found
from sparse_ffn.convert.find.known import to_values
from sparse_ffn.convert.find.linear import as_linear
from sparse_ffn.convert.group import Group
from sparse_ffn.convert.init.build import Built
from sparse_ffn.convert.init.evaluating import evaluating
from sparse_ffn.convert.init.weights import relative_error
from sparse_ffn.convert.places import mixed, places_of, put, replaceable, twins
from sparse_ffn.convert.report import Replacement, Report
from sparse_ffn.layers import LowRankMoE, MoE
from sparse_ffn.layers.shared_expert import SharedExpertMoE
from sparse_ffn.ops.autocast import without_autocast

NOISE = 64  # tokens


@torch.inference_mode(False)  # a parameter that is made in it never trains
def sparsify_(
    model: nn.Module,
    config: FFNConfig | Mapping[str, FFNConfig],
    filter_fn: Filter | None = None,
    *,
    calibration: Mapping[str, Tensor] | Iterable[Any] | None = None,
    example_inputs: Any = None,
) -> Report:
    """Replace the feed-forward blocks of a model by sparse layers, in place.

    They are found by what they compute: copies of modules run on small random inputs with random weights, and only what
    then equals a two-layer FFN is replaced. Either all are replaced or, with an error, none.

    Args:
        model: any module. Device, dtype, training mode, ``requires_grad`` and sharing of modules are kept.
        config: what the FFNs become; or a mapping from the names of some of them to the config of each.
        filter_fn: ``filter_fn(module, name) -> bool`` says which FFNs are replaced; it gets what is at ``name`` now.
        calibration: batches, as ``calibrate``'s; or what ``calibrate`` returned for this model, which must hold every
            FFN that is replaced. With batches the FFNs whose configs give ``active`` share out the units that a token
            uses in all: each gets its own k, by what the model's outputs lose on the first batch.
        example_inputs: a batch that the model can run on, for FFNs inside modules that need more than tokens, a memory
            and a mask: they are then tried with what they get on it. None for the first of the batches.

    Returns:
        What was replaced and what was left, with parameters, FLOPs and what was done with the weights.

    Raises:
        TypeError: ``model`` is no module, ``config`` no config of this library, ``filter_fn`` no function or
            ``calibration`` neither a mapping to tensors nor batches.
        ValueError: the config does not fit an FFN, or names one that is not there or cannot be replaced; the
            calibration lacks one, or is of another width; a lazy module has not run yet. The model is as it was.

    Warns:
        SparseFFNWarning: nothing is replaced, though something looks like an FFN; the outputs on the first batch do not
            tell what FFNs lose that share out units.
    """
    for one in config.values() if isinstance(config, Mapping) else (config,):
        _check_config(one)
    if filter_fn is not None:
        check_function("filter_fn", filter_fn, "module and name")
    check_changeable("model", model)
    batches = _check_calibration(calibration)
    if example_inputs is None and batches is not None:
        example_inputs = next(iter(batches.first), None)
    # integrations give what an example has shown before
    examples = example_inputs if isinstance(example_inputs, Examples) else Examples(model, example_inputs)
    found, unknown = find(model, examples)
    configs = dict(config) if isinstance(config, Mapping) else {f.name: config for f in found}
    names = [f.name for f in found]
    if missing := [name for name in configs if name not in names]:
        whys = "".join(f"; {name}: {unknown[name]}" for name in missing if name in unknown)
        raise ValueError(f"no FFN is at {', '.join(map(repr, missing))} of config; there are {names}{whys}")
    wanted = [f for f in found if f.name in configs and (filter_fn is None or filter_fn(f.module, f.name))]
    skipped = tuple(f.name for f in found if f not in wanted)
    places = places_of(model)
    keys = {f.name: twins(f, configs[f.name]) for f in wanted}
    asked, wanted = wanted, replaceable(model, wanted, keys, places, unknown, examples)
    examples.forget()
    left = [f"{f.name}: {unknown[f.name]}" for f in asked if f not in wanted]
    if left and isinstance(config, Mapping):
        raise ValueError(f"config names FFNs that cannot be replaced: {'; '.join(left)}")
    if not wanted:
        _tell(unknown)
    inputs: Any = calibration
    if batches is not None:
        inputs = sample(model, wanted, batches) if wanted else {}
    samples = {} if inputs is None else {f.name: _sample(f, inputs) for f in wanted}
    groups: dict[object, Group] = {}
    for f in wanted:
        groups.setdefault(keys[f.name], Group(configs[f.name])).add(f, samples.get(f.name))
    every_name: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        every_name[module].append(name)
    if batches is not None:
        share_out(model, list(groups.values()), lambda f: len(every_name[f]), places, batches.first)
    made = {key: group.make() for key, group in groups.items()}
    of_each = [(f, groups[keys[f.name]], made[keys[f.name]]) for f in wanted]
    replacements = [_replacement(f, new, group, every_name[f.module]) for f, group, new in of_each]
    put(model, [(f, new.module) for f, _, new in of_each], places)
    return Report(tuple(replacements), unknown, skipped, _others(model, [new.module for new in made.values()]))


@torch.inference_mode(False)
def from_dense(ffn: nn.Module, config: FFNConfig, *, inputs: Tensor | None = None) -> nn.Module:
    """Make a sparse layer from one FFN, which stays as it is.

    Args:
        ffn: a module that computes a two-layer FFN: any that ``sparsify_`` finds within a model.
        config: what it becomes.
        inputs: [..., d_model] that it sees, for calibration.

    Returns:
        The layer; a dropout after it if the FFN ends in one, and a ``ConstantInput`` before it if its gate has a bias.

    Raises:
        TypeError: ``ffn`` is no module, ``config`` no config of this library or ``inputs`` no tensor.
        ValueError: the module is no FFN (the message says what was seen), or the config does not fit it.
    """
    _check_config(config)
    if inputs is not None:
        check_type("inputs", inputs, Tensor, "a tensor [..., d_model]")
        check_floating("inputs", inputs)
    f = find_one(ffn)
    if (why := mixed(f.weights())) is not None:
        raise ValueError(f"the FFN: {why}")
    group = Group(config)
    group.add(f, None if inputs is None else _rows(f, inputs))
    return group.make().module


def _check_config(config: object) -> None:
    if not isinstance(config, FFNConfig):
        raise TypeError(f"config must be a config of sparse_ffn, such as SigmaMoEConfig(k=4), got {shown(config)}")


def _check_calibration(calibration: object) -> Batches | None:
    """The batches, if it is some; what ``calibrate`` returned is checked."""
    if calibration is None:
        return None
    if isinstance(calibration, Iterable) and not isinstance(calibration, (Mapping, Tensor, str)):
        return Batches(calibration)
    values = list(calibration.values()) if isinstance(calibration, Mapping) else [calibration]
    if not isinstance(calibration, Mapping) or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise TypeError(f"calibration must map names to tensors, as calibrate returns, or hold batches, got {kinds}")
    for name, value in calibration.items():
        check_floating(f"calibration[{name!r}]", value)
    return None


def _sample(f: Found, calibration: Mapping[str, Tensor]) -> Tensor:
    if f.name not in calibration:
        raise ValueError(
            f"calibration has nothing for {f.name!r}, only for {list(calibration)}: give calibrate batches that "
            "reach it and the same filter_fn, or leave it out with filter_fn"
        )
    return _rows(f, calibration[f.name])


def _rows(f: Found, inputs: Tensor) -> Tensor:
    """What an FFN sees, as a matrix like its own: ``from_dense``'s inputs, or its part of a model's calibration."""
    ffn, what = f.weights(), f"{f.name}: its calibration" if f.name else "inputs"
    if inputs.dim() < 1 or inputs.shape[-1] != ffn.d_model or not inputs.numel():
        raise ValueError(f"{what} must be [at least 1 token, d_model = {ffn.d_model}], got {list(inputs.shape)}")
    if ffn.keys.is_meta:
        raise ValueError(f"{f.name or 'the FFN'}: calibration needs numbers; a model on meta has none")
    if inputs.is_meta:
        raise ValueError(f"{what} must hold numbers, got a tensor on meta")
    if not bool(inputs.isfinite().all()):
        raise ValueError(f"{what} must be finite")
    rows = inputs.reshape(-1, ffn.d_model).to(ffn.keys)
    with torch.no_grad(), without_autocast(rows):
        if not bool(ffn.output(rows).isfinite().all()):
            kept = str(rows.dtype).removeprefix("torch.")
            raise ValueError(f"{what} must give finite outputs of the FFN, whose numbers are {kept}")
    return rows


def _tell(unknown: Mapping[str, str]) -> None:
    """Warn that nothing was replaced where something looked like an FFN."""
    reasons = [f"{name or 'the model'}: {why}" for name, why in unknown.items()]
    if reasons:
        more = f" (and {len(reasons) - 3} more, in report.unknown)" if len(reasons) > 3 else ""
        warnings.warn(
            f"no FFN was replaced; what looked like one was left: {'; '.join(reasons[:3])}{more}",
            SparseFFNWarning,
            stacklevel=4,  # beyond sparsify_ and its decorator
        )


@torch.no_grad()
def _replacement(f: Found, new: Built, group: Group, names: list[str]) -> Replacement:
    """The report's line on an FFN, whose new layer may stand for others too."""
    ffn, layer, first = f.weights(), new.layer, group.members[0].name
    error, rows = None, group.rows_of(f)
    noise = rows is None and new.config.init != "fresh" and not ffn.keys.is_meta
    if noise:
        generator = torch.Generator().manual_seed(0)
        rows = torch.randn(NOISE, ffn.d_model, generator=generator, device="cpu").to(ffn.keys)
    if rows is not None and new.config.init != "fresh":
        with evaluating(new.module), without_autocast(rows):
            error = relative_error(new.module(rows), ffn.output(rows))
    tied = None if f.name == first else first
    return Replacement(
        name=f.name,
        pattern=f.pattern,
        layer=_in_words(layer),
        config=new.config,
        parameters=(ffn.n_parameters(), layer.n_parameters),
        flops=(ffn.flops_per_token(), layer.flops_per_token()),
        note=new.note if tied is None else f"the layer of {tied}",
        shared=tuple(name for name in names if name != f.name),
        relative_error=error,
        on_noise=noise,
        tied=tied,
        curve=group.curve,
        match=to_values(f) if f.by_example else None,
    )


def _in_words(layer: Converted) -> str:
    """Its class and sizes."""
    if isinstance(layer, SharedExpertMoE):
        return f"{_in_words(layer._own_moe())} beside {layer.shared.d_ff} shared"
    sizes = f"E={layer.n_experts} G={layer.expert_size} " if isinstance(layer, (MoE, LowRankMoE)) else ""
    return f"{type(layer).__name__} {sizes}k={layer.k}"


def _others(model: nn.Module, new: list[nn.Module]) -> dict[str, int]:
    """The modules that still have matrices of their own, grouped by name with the numbers left out."""
    inside = {inner for module in new for inner in module.modules()}
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if module in inside:
            continue
        shapes = ["x".join(map(str, p.shape)) for p in module.parameters(recurse=False) if p.dim() > 1]
        if next(module.parameters(), None) is None and (linear := as_linear(name, module)) is not None:
            shapes = [f"{linear.n_out}x{linear.n_in}"]  # quantised: its matrix is no parameter
        if shapes:
            pattern = without_numbers(name) or "the model itself"
            counts[f"{pattern} ({type(module).__name__} {' '.join(shapes)})"] += 1
    return dict(counts)
