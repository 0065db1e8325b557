"""sparsify_: the FFNs of a model become sparse layers, in place; from_dense: one FFN becomes a layer."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_ffn.checks import check_floating, check_function, check_type
from sparse_ffn.convert.calibrate import Filter
from sparse_ffn.convert.config import FFNConfig
from sparse_ffn.convert.find.edits import apply, set_attribute, switch_off_fast_path
from sparse_ffn.convert.find.find import find, find_one, without_numbers
from sparse_ffn.convert.find.found import Found
from sparse_ffn.convert.find.linear import as_linear
from sparse_ffn.convert.find.match import rejection
from sparse_ffn.convert.init.build import Built, ConstantInput, build
from sparse_ffn.convert.init.weights import FFNWeights, wide
from sparse_ffn.convert.report import Report, Swap
from sparse_ffn.layers import MoE, SparseFFN

_Slots = dict[int, list[tuple[nn.Module, str, str]]]


def sparsify_(
    model: nn.Module,
    config: FFNConfig | Mapping[str, FFNConfig],
    filter_fn: Filter | None = None,
    *,
    calibration: Mapping[str, Tensor] | None = None,
) -> Report:
    """Replace the feed-forward blocks of a model by sparse layers, in place.

    They are found by what they compute: copies of modules run on small random inputs with random weights, and only what
    then equals a two-layer FFN is replaced. Either all are replaced or, with an error, none.

    Args:
        model: any module. Device, dtype, training mode, ``requires_grad`` and sharing of modules are kept.
        config: what the FFNs become; or a mapping from the names of some of them to the config of each.
        filter_fn: ``filter_fn(module, name) -> bool`` says which FFNs are replaced; it gets what is at ``name`` now.
        calibration: what ``calibrate`` returned for this model: it must hold every FFN that is replaced.

    Returns:
        What was replaced and what was left, with parameters, FLOPs and what was done with the weights.

    Raises:
        TypeError: ``model`` is no module, ``config`` no config of this library, ``filter_fn`` no function or
            ``calibration`` no mapping to tensors.
        ValueError: the config does not fit an FFN, or names one that is not there; the calibration lacks one, or is of
            another width; a lazy module has not run yet. The model is as it was.
    """
    for one in config.values() if isinstance(config, Mapping) else (config,):
        _check_config(one)
    if filter_fn is not None:
        check_function("filter_fn", filter_fn, "module and name")
    if calibration is not None:
        _check_calibration(calibration)
    found, unknown = find(model)
    if isinstance(config, Mapping):
        missing = [name for name in config if name not in {f.name for f in found}]
        if missing:
            raise ValueError(
                f"no FFN is at {', '.join(map(repr, missing))} of config; there are {[f.name for f in found]}"
            )
    configs = {f.name: config.get(f.name) if isinstance(config, Mapping) else config for f in found}
    wanted = [f for f in found if configs[f.name] is not None and (filter_fn is None or filter_fn(f.module, f.name))]
    skipped = tuple(f.name for f in found if f not in wanted)
    slots = _slots(model)
    wanted = _fitting(wanted, slots, unknown)
    identity = {f.name: _identity(f, configs[f.name]) for f in wanted}
    free = _free(model, wanted, identity, slots, unknown)
    samples = {f.name: None if calibration is None else _sample(f, calibration) for f in free}
    places: dict[nn.Module, list[str]] = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        places[module].append(name)
    plans: list[_Plan] = []
    made: dict[object, _Made] = {}
    for f in free:
        key, each = identity[f.name], configs[f.name]
        assert each is not None
        if key not in made:
            seen = [rows for g in free if identity[g.name] == key and (rows := samples[g.name]) is not None]
            made[key] = _make(f, each, torch.cat(seen) if seen else None)
        plans.append(_plan(f, made[key], samples[f.name], places))
    _swap(model, plans, slots)
    return Report(tuple(p.swap for p in plans), unknown, skipped, _others(model, plans))


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
    if (mixed := _mixed(f.weights())) is not None:
        raise ValueError(f"the FFN: {mixed}")
    return _make(f, config, None if inputs is None else _rows(f, inputs)).module


def _check_config(config: object) -> None:
    if not isinstance(config, FFNConfig):
        raise TypeError(f"config must be a config of sparse_ffn, such as SigmaMoEConfig(k=4), got {config!r}")


def _check_calibration(calibration: object) -> None:
    values = list(calibration.values()) if isinstance(calibration, Mapping) else [calibration]
    if not isinstance(calibration, Mapping) or not all(isinstance(value, Tensor) for value in values):
        kinds = ", ".join(sorted({type(value).__name__ for value in values}))
        raise TypeError(f"calibration must map names to tensors, as calibrate returns, got {kinds}")
    for name, value in calibration.items():
        check_floating(f"calibration[{name!r}]", value)


@dataclass(frozen=True)
class _Made:
    """What replaces an FFN, and all others that have the same parameters and become the same."""

    name: str
    """Of the first of them."""
    module: nn.Module
    built: Built


@dataclass(frozen=True)
class _Plan:
    found: Found
    module: nn.Module
    swap: Swap


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
    return inputs.reshape(-1, ffn.d_model).to(ffn.keys)


def _plain(ffn: FFNWeights, rows: Tensor | None) -> tuple[FFNWeights, Tensor | None]:
    """Without a gate bias: weights and inputs as a layer after a ``ConstantInput`` has them."""
    if ffn.gate_bias is None:
        return ffn, rows
    return ffn.with_constant_input(), None if rows is None else ConstantInput()(rows)


def _make(f: Found, config: FFNConfig, rows: Tensor | None) -> _Made:
    """Build what replaces an FFN, without touching the model."""
    ffn = f.weights()
    try:
        built = build(config, *_plain(ffn, rows))
    except (ValueError, TypeError) as error:
        raise type(error)(f"{f.name or 'the FFN'} ({f.pattern}, d_ff = {ffn.d_ff}): {error}") from error
    parts: list[nn.Module] = [*([] if ffn.gate_bias is None else [ConstantInput()]), built.layer]
    if f.out_dropout:
        parts.append(nn.Dropout(f.out_dropout))
    module = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    return _Made(f.name, module.train(f.module.training), built)


def _plan(f: Found, made: _Made, rows: Tensor | None, places: Mapping[nn.Module, list[str]]) -> _Plan:
    ffn, layer = f.weights(), made.built.layer
    note = made.built.note + ("" if ffn.gate_bias is None else "; a constant input carries the gate's bias")
    plain, inputs = _plain(ffn, rows)
    swap = Swap(
        f.name, f.pattern, _describe(layer), made.built.config,
        (ffn.n_parameters(), layer.n_parameters), (ffn.flops_per_token(), layer.flops_per_token()),
        note if f.name == made.name else f"the layer of {made.name}",
        tuple(place for place in places[f.module] if place != f.name),
        None if inputs is None else moved(layer, plain, inputs),
        None if f.name == made.name else made.name,
    )  # fmt: skip
    return _Plan(f, made.module, swap)


@torch.no_grad()
def moved(layer: SparseFFN, ffn: FFNWeights, inputs: Tensor) -> float:
    """Relative error of a layer's output: ‖layer(x) - ffn(x)‖ / ‖ffn(x)‖ over all inputs, in evaluation mode."""
    training = layer.training
    layer.eval()
    y = wide(layer(inputs))
    layer.train(training)
    if isinstance(layer, MoE):
        layer._last = None
    wanted = wide(ffn.output(inputs))
    return float((y - wanted).norm() / wanted.norm().clamp_min(1e-30))


def _mixed(ffn: FFNWeights) -> str | None:
    kinds = {f"{t.dtype} on {t.device}" for t in ffn.tensors().values()}
    return f"its parameters differ in dtype or device: {', '.join(sorted(kinds))}" if len(kinds) > 1 else None


def _describe(layer: SparseFFN) -> str:
    sizes = f"E={layer.n_experts} G={layer.expert_size} k={layer.k}" if isinstance(layer, MoE) else f"k={layer.k}"
    return f"{type(layer).__name__} {sizes}"


def _slots(model: nn.Module) -> _Slots:
    """Where each module hangs: its owners, their attributes, the full names."""
    slots: _Slots = defaultdict(list)
    for path, owner in model.named_modules():
        for attribute, child in owner._modules.items():
            if child is not None:
                slots[id(child)].append((owner, attribute, f"{path}.{attribute}" if path else attribute))
    return slots


def _parameter_owners(model: nn.Module) -> dict[int, set[nn.Module]]:
    owners: dict[int, set[nn.Module]] = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)].add(module)
    return owners


def _identity(f: Found, config: FFNConfig | None) -> object:
    """The same for FFNs that have the same parameters and become the same: one new layer stands in all their places."""
    parameters = tuple(id(p) for linear in (*f.ups, f.down) for p in linear.module.parameters())
    return parameters, f.formula, f.dropout, f.out_dropout, repr(config)


def _fitting(wanted: list[Found], slots: _Slots, unknown: dict[str, str]) -> list[Found]:
    """The FFNs that a layer can stand for where they are; the others become unknown, with the reason."""
    left: dict[str, str] = {}
    for f in wanted:
        parents = {owner: attribute for owner, attribute, _ in slots[id(f.module)]}
        if "_orig_mod" in parents.values():
            left[f.name] = "it is compiled by itself, and would go on as it was: convert first, then compile"
        for reason in (_mixed(f.weights()), *(rejection(f, parent) for parent in parents)):
            if reason is not None:
                left.setdefault(f.name, reason)
    unknown.update(left)
    return [f for f in wanted if f.name not in left]


def _free(
    model: nn.Module, wanted: list[Found], identity: Mapping[str, object], slots: _Slots, unknown: dict[str, str]
) -> list[Found]:
    """The FFNs whose parts nothing else uses; the others become unknown, with the reason."""
    owners = _parameter_owners(model)
    free = wanted
    while True:  # leaving one can tie down another
        of = {linear.module: identity[f.name] for f in free for linear in (*f.ups, f.down)}
        left = {}
        for f in free:
            own = {linear.module for linear in (*f.ups, f.down)}
            for linear in (*f.ups, f.down):
                places = [path for _, _, path in slots.get(id(linear.module), [])]
                if len(places) > 1 and own != {f.module}:  # a layer of this library hangs as a whole
                    left[f.name] = f"{linear.name} is used in several places: {', '.join(places)}"
                elif any(of.get(o) != identity[f.name] for p in linear.module.parameters() for o in owners[id(p)]):
                    left[f.name] = f"parameters of {linear.name} are tied to something that is not replaced alike"
                elif any(len(owners[id(p)] & own) > 1 for p in linear.module.parameters()):
                    left[f.name] = f"parameters of {linear.name} are tied to other ones of the same FFN"
        if not left:
            return free
        unknown.update(left)
        free = [f for f in free if f.name not in left]


def _swap(model: nn.Module, plans: list[_Plan], slots: _Slots) -> None:
    """Put all new modules in; on any error take all out again."""
    undo: list[Callable[[], None]] = []
    try:
        for plan in plans:
            for owner, attribute, _ in slots[id(plan.found.module)]:
                undo.append(set_attribute(owner, attribute, plan.module))
            if plan.found.edits:
                enclosing = model.get_submodule(plan.found.enclosing)
                undo += apply(enclosing, plan.found.edits)
                for module in model.modules():
                    if any(inner is enclosing for inner in module.modules()):
                        undo += switch_off_fast_path(module)
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def _others(model: nn.Module, plans: list[_Plan]) -> dict[str, int]:
    """The modules that still have matrices of their own, grouped by name with the numbers left out."""
    new = {inner for plan in plans for inner in plan.module.modules()}
    counts: Counter[str] = Counter()
    for name, module in model.named_modules():
        if module in new:
            continue
        shapes = ["x".join(map(str, p.shape)) for p in module.parameters(recurse=False) if p.dim() > 1]
        if next(module.parameters(), None) is None and (linear := as_linear(name, module)) is not None:
            shapes = [f"{linear.n_out}x{linear.n_in}"]  # quantised: its matrix is no parameter
        if shapes:
            pattern = without_numbers(name) or "the model itself"
            counts[f"{pattern} ({type(module).__name__} {' '.join(shapes)})"] += 1
    return dict(counts)
