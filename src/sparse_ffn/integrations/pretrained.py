"""Converted models of transformers, saved and loaded: the conversion is written into the model's config."""

from __future__ import annotations

import dataclasses
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import check_type, shown
from sparse_ffn.convert import Report, config_from_dict, config_of, sparsify_
from sparse_ffn.convert.find.examples import Examples
from sparse_ffn.integrations import quantized
from sparse_ffn.integrations.precision import check_precision, kept_in_fp32
from sparse_ffn.layers import SparseFFN
from sparse_ffn.layers.rows.base import ExpertRows
from sparse_ffn.layers.shared_expert import SharedExpertMoE

KEY = "sparse_ffn"  # of the record in config.json
MATCHES = "sparse_ffn_matches"  # FFNs that only an example shows: where they lie
UNRECORDED = "unrecorded"  # instead of a config: why there is none
WHERE = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
"""Options that say where a config is, and where the weights are."""
OF_MODELS = ("attn_implementation", "device_map", "dtype", "output_loading_info", "quantization_config", "torch_dtype")
"""Options that are for a model and may have a config's names."""


def record_conversion(model: Any, report: Report | None = None) -> None:
    """Write what ``sparsify_`` did into ``model.config``, so that ``save_pretrained`` saves it with the weights.

    After it every way to save works: ``model.save_pretrained``, the Trainer's checkpoints, ``push_to_hub``. Each saves
    the layers' options as they then are. Load with ``from_pretrained`` of this module. For a model that was converted
    in several steps, call it after each. Where no config can say any more what a layer is, a save warns, has all
    weights and no config of that layer, and ``from_pretrained`` says so.

    Args:
        model: a ``transformers.PreTrainedModel`` that ``sparsify_`` converted.
        report: what ``sparsify_`` returned; None for a model that was recorded and then pickled, whose record no longer
            follows its layers.

    Raises:
        TypeError: ``model`` is no model of transformers or ``report`` no report.
        ValueError: the report names a module that the model does not have or that was not converted, no config can
            say what a layer is, or there is no report and no record.
    """
    check_type("model", model, transformers.PreTrainedModel, "a transformers.PreTrainedModel")
    known = getattr(model.config, KEY, None) or {}
    if report is None:
        if not known:
            raise ValueError("report must be given: the config of model records no conversion yet")
        setattr(model.config, KEY, Record(model, _present(model, known, _refuse)))
        return
    check_type("report", report, Report, "what sparsify_ returned")
    places = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in report.names if name not in places]
    if missing:
        raise ValueError(f"report is of another model: this one has no {', '.join(map(repr, missing))}")
    dense = [name for name in report.names if not _layers(places[name])]
    if dense:
        raise ValueError(f"report is of another model: of this one {', '.join(map(repr, dense))} was not converted")
    _tie(model)
    setattr(model.config, KEY, Record(model, _present(model, {**known, **report.configs}, _refuse)))
    matches = {new.name: new.match for new in report.replacements if new.match is not None}
    if matches:
        setattr(model.config, MATCHES, {**(getattr(model.config, MATCHES, None) or {}), **matches})
    quantized.prepare(model)  # of what was quantised before this module was imported, nobody has told us


class Record(dict[str, Any]):
    """The configs of a model's converted layers by name; a copy, and so what is saved, has the layers' present options.

    A pickle is a plain dict, with the options as they were. Nothing raises here: transformers asks for a copy when it
    has already emptied the config's file.

    Args:
        model: what has the layers. The record does not keep it alive.
        configs: as ``Report.to_dict`` gives them.
    """

    def __init__(self, model: Any, configs: dict[str, Any]) -> None:
        super().__init__(configs)
        self._model = weakref.ref(model)

    def now(self) -> dict[str, Any]:
        """The configs as the layers are now; places that hold no layer any more are left out.

        transformers, which looks at tensors after it has asked for these, hears which of them the layers now share.
        """
        model = self._model()
        if model is None:
            return dict(self)
        _tie(model)
        found = _present(model, self, _note)
        self.update(found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        twin = memo.get(id(self._model()))  # there if the whole model is being copied
        return self.now() if twin is None else Record(twin, dict(self))

    def __reduce__(self) -> Any:
        return dict, (self.now(),)


def _refuse(name: str, error: Exception) -> dict[str, Any]:
    raise ValueError(f"{name!r} cannot be recorded: {error}") from error


def _note(name: str, error: Exception) -> dict[str, Any]:
    warnings.warn(
        f"{name!r} cannot be recorded: {error}. What is saved has its weights, but from_pretrained cannot make it",
        SparseFFNWarning,
        stacklevel=2,
    )
    return {UNRECORDED: str(error)}


def _present(model: Any, names: Iterable[str], otherwise: Callable[[str, Exception], dict[str, Any]]) -> dict[str, Any]:
    """The config of the layer that is now at each of these places, if there is one, or what is there otherwise."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if name not in names or not (layers := _layers(module)):
            continue
        try:
            if len(layers) > 1:
                raise ValueError(f"it holds {len(layers)} layers")
            found[name] = config_of(layers[0]).to_dict()
        except (TypeError, ValueError) as error:
            found[name] = otherwise(name, error)
    return found


def _layers(module: Any) -> list[SparseFFN | SharedExpertMoE]:
    """The layers in what took the place of an FFN, one with a shared expert as a whole."""
    whole = [m for m in module.modules() if isinstance(m, SharedExpertMoE)]
    parts = {part for m in whole for part in m.modules()}
    return whole + [m for m in module.modules() if isinstance(m, SparseFFN) and m not in parts]


def from_pretrained(path: str, model_class: type[Any] | None = None, **options: Any) -> Any:
    """Load a model that was converted or whose experts were quantised: built from its config, changed as that records,
    then given the weights. Codes are loaded as codes: no dense weights of theirs are ever in memory.

    Args:
        path: what transformers' ``from_pretrained`` takes: a folder or a name on the hub.
        model_class: a class of transformers (no ``Auto`` class); None for the one that was saved.
        options: for the class's own ``from_pretrained``.

    Returns:
        What ``model_class.from_pretrained(path, **options)`` returns.

    Raises:
        TypeError: ``path`` is no path; ``model_class`` is an ``Auto`` class, or is not given and transformers does not
            have the saved one.
        ValueError: the config records no conversion, or one that cannot be read or does not fit the model; a converted
            layer gets no weights.

    Warns:
        SparseFFNWarning: transformers would keep a part of an FFN in fp32, which a layer of 16 bits has taken up.
    """
    check_type("path", path, (str, os.PathLike), "a folder or a name on the hub")
    config = options.pop("config", None)
    if config is None or isinstance(config, (str, os.PathLike)):
        # as transformers does it: what a config has of the options is set in it, the others are the model's
        others = {name: value for name, value in options.items() if name not in OF_MODELS}
        place: Any = path if config is None else config
        config, left = transformers.AutoConfig.from_pretrained(place, return_unused_kwargs=True, **others)
        options = {n: v for n, v in options.items() if n in left or n in WHERE or n in OF_MODELS}
    record: dict[str, dict[str, Any]] = getattr(config, KEY, None) or {}
    stored = getattr(config, quantized.KEY, None)
    if not record and not stored:
        raise ValueError(
            f"the config of {str(path)!r} records no conversion: call record_conversion(model, report) before "
            "save_pretrained, or load a model that was neither converted nor quantised with transformers itself"
        )
    _check_record(path, record)
    architecture = (config.architectures or [""])[0]
    base: Any = model_class or getattr(transformers, architecture, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise TypeError(
            f"model_class must be a model's own class, such as LlamaForCausalLM, got {base!r} for "
            f"architectures = {config.architectures}"
        )

    kept: dict[str, set[torch.dtype]] = {}

    class Converted(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            kept.update(kept_in_fp32(self))
            with _tied(self):
                configs = {name: config_from_dict(values) for name, values in _places(self, record).items()}
                if configs:
                    fresh = {name: dataclasses.replace(chosen, init="fresh") for name, chosen in configs.items()}
                    sparsify_(self, fresh, example_inputs=Examples(self, known=_known(self, config, fresh)))
            if stored:
                quantized.store(self, stored, partial(_places, self))
            _tie(self)

        # a layer in several places is loaded in one
        def mark_tied_weights_as_initialized(self, *loading_info: Any) -> None:
            super().mark_tied_weights_as_initialized(*loading_info)
            for info in loading_info:
                info.missing_keys -= _shared(self).keys()

        def _move_missing_keys_from_meta_to_device(self, missing_keys: Any, *args: Any, **kwargs: Any) -> None:
            missing_keys = missing_keys - _shared(self).keys()  # transformers before 5.3 passes no loading_info
            super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    Converted.__name__, Converted.__module__ = base.__name__, base.__module__  # some models look for it in their module
    Converted.__qualname__ = base.__qualname__  # by which transformers keeps what outputs a class records
    wants_info = options.pop("output_loading_info", False)
    model, info = Converted.from_pretrained(path, config=config, output_loading_info=True, **options)
    model.__class__ = base
    if record:
        setattr(model.config, KEY, Record(model, _present(model, _places(model, record), _refuse)))
    if stored:
        quantized.prepare(model)
    info["missing_keys"] -= _shared(model).keys()
    _check_loaded(model, info["missing_keys"])
    check_precision(model, kept)
    return (model, info) if wants_info else model


def _check_record(path: Any, record: Any) -> None:
    """Raise ValueError unless a record, which may come from anywhere, is one."""
    of = f"the config of {str(path)!r} has a damaged record {KEY}"
    if not isinstance(record, Mapping):
        raise ValueError(f"{of}: {KEY} must map names of modules to configs, got {shown(record)}")
    name = ""
    try:
        for name in record:
            if isinstance(record[name], Mapping) and UNRECORDED in record[name]:
                raise ValueError(f"it could not be recorded when the model was saved: {record[name][UNRECORDED]}")
            config_from_dict(record[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{of}, {name}: {error}") from error


def _check_loaded(model: Any, missing: Iterable[str]) -> None:
    """Raise ValueError where a converted layer got no weights: transformers only reports it, and draws new ones."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, (SparseFFN, ExpertRows)))
    lost = sorted(key for key in missing if key.startswith(layers))
    if lost:
        raise ValueError(f"the checkpoint lacks weights of converted layers: {', '.join(lost)}")


def _places(model: Any, record: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The record with this model's names."""
    here = _namer(model)
    return {here(name): values for name, values in record.items()}


def _namer(model: Any) -> Callable[[str], str]:
    """From a name in a record to this model's: without its head it lacks a prefix, and the other way round."""
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    return lambda name: next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), name)


def _known(model: Any, config: Any, converted: Iterable[str]) -> dict[str, Any]:
    """Where the converted FFNs lie that only an example shows, with this model's names."""
    matches = getattr(config, MATCHES, None) or {}
    if not isinstance(matches, Mapping) or not all(isinstance(match, Mapping) for match in matches.values()):
        raise ValueError(f"{MATCHES} of the config must map names of modules to where FFNs lie, got {shown(matches)}")
    here, found = _namer(model), {}
    for name, match in matches.items():
        own = {key: here(str(match.get(key))) for key in ("down", "enclosing")}
        found[here(name)] = {**match, **own}
    return {name: match for name, match in found.items() if name in converted}


@contextmanager
def _tied(model: Any) -> Iterator[None]:
    """Tie the weights of a model that is being loaded, which transformers does later: tied FFNs become one layer."""

    def set_parameter(name: str, tensor: Tensor) -> None:
        owner, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, tensor)

    own = {name: model.get_parameter(name) for name in model.all_tied_weights_keys}
    for name, source in model.all_tied_weights_keys.items():
        set_parameter(name, model.get_parameter(source))
    yield
    left = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name in own.keys() & left:
        set_parameter(name, own[name])


def _shared(model: Any) -> dict[str, str]:
    """The tensors of converted layers that are in several places: each further name of one, and its first name."""
    first: dict[int, str] = {}
    layers = [(f"{n}.", m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, SparseFFN)]
    tensors = [(path + n, t) for path, m in layers for n, t in m.state_dict(keep_vars=True).items()]
    return {name: place for name, tensor in tensors if (place := first.setdefault(id(tensor), name)) != name}


def _tie(model: Any) -> None:
    """Tell transformers which tensors converted layers share, in place of those that went with the FFNs."""
    for part in model.modules():
        if not isinstance(part, transformers.PreTrainedModel):
            continue
        left = {name for name, _ in part.named_parameters(remove_duplicate=False)}
        known = {target: source for target, source in part.all_tied_weights_keys.items() if {target, source} <= left}
        several = _shared(part)
        if several or known != part.all_tied_weights_keys:
            part.all_tied_weights_keys = known | {name: place for name, place in several.items() if name in left}
            part._tied_weights_keys = known | several
