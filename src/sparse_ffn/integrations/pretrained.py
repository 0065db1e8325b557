"""Converted models of transformers, saved and loaded: the conversion is written into the model's config."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any

import transformers

from sparse_ffn.checks import check_type, shown
from sparse_ffn.convert import Report, config_from_dict, sparsify_
from sparse_ffn.layers import SparseFFN

KEY = "sparse_ffn"  # of the record in config.json
WHERE = (
    "cache_dir", "code_revision", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token",
    "trust_remote_code",
)  # fmt: skip
"""Options that say where a config is."""


def record_conversion(model: Any, report: Report) -> None:
    """Write what ``sparsify_`` did into ``model.config``, so that ``save_pretrained`` saves it with the weights.

    After it every way to save works: ``model.save_pretrained``, the Trainer's checkpoints, ``push_to_hub``. Load with
    ``from_pretrained`` of this module. For a model that was converted in several steps, call it after each.

    Args:
        model: a ``transformers.PreTrainedModel`` that ``sparsify_`` converted.
        report: what ``sparsify_`` returned.

    Raises:
        TypeError: ``model`` is no model of transformers or ``report`` no report.
        ValueError: the report names a module that the model does not have.
    """
    check_type("model", model, transformers.PreTrainedModel, "a transformers.PreTrainedModel")
    check_type("report", report, Report, "what sparsify_ returned")
    names = {name for name, _ in model.named_modules()}
    missing = [name for name in report.names if name not in names]
    if missing:
        raise ValueError(f"report is of another model: this one has no {', '.join(map(repr, missing))}")
    setattr(model.config, KEY, {**(getattr(model.config, KEY, None) or {}), **report.to_dict()})


def from_pretrained(path: str, model_class: type[Any] | None = None, **options: Any) -> Any:
    """Load a converted model: its class is built from the config, converted as recorded, then given the weights.

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
    """
    check_type("path", path, (str, os.PathLike), "a folder or a name on the hub")
    config = options.pop("config", None)
    if config is None:
        config = transformers.AutoConfig.from_pretrained(path, **{n: options[n] for n in WHERE if n in options})
    record: dict[str, dict[str, Any]] = getattr(config, KEY, None) or {}
    if not record:
        raise ValueError(
            f"the config of {str(path)!r} records no conversion: call record_conversion(model, report) before "
            "save_pretrained, or load an unconverted model with transformers itself"
        )
    _check_record(path, record)
    architecture = (config.architectures or [""])[0]
    base: Any = model_class or getattr(transformers, architecture, None)
    if not (isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)):
        raise TypeError(
            f"model_class must be a model's own class, such as LlamaForCausalLM, got {base!r} for "
            f"architectures = {config.architectures}"
        )

    class Converted(base):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            _convert(self, record)

    Converted.__name__, Converted.__module__ = base.__name__, base.__module__  # some models look for it in their module
    wants_info = options.pop("output_loading_info", False)
    model, info = Converted.from_pretrained(path, config=config, output_loading_info=True, **options)
    model.__class__ = base
    _check_loaded(model, info["missing_keys"])
    return (model, info) if wants_info else model


def _check_record(path: Any, record: Any) -> None:
    """Raise ValueError unless a record, which may come from anywhere, is one."""
    of = f"the config of {str(path)!r} has a damaged record {KEY}"
    if not isinstance(record, Mapping):
        raise ValueError(f"{of}: {KEY} must map names of modules to configs, got {shown(record)}")
    name = ""
    try:
        for name in record:
            config_from_dict(record[name])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{of}, {name}: {error}") from error


def _check_loaded(model: Any, missing: Iterable[str]) -> None:
    """Raise ValueError where a converted layer got no weights: transformers only reports it, and draws new ones."""
    layers = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SparseFFN))
    lost = sorted(key for key in missing if key.startswith(layers))
    if lost:
        raise ValueError(f"the checkpoint lacks weights of converted layers: {', '.join(lost)}")


def _convert(model: Any, record: dict[str, dict[str, Any]]) -> None:
    """Layers of the recorded shapes in the recorded places; the weights are those of the checkpoint."""
    prefix = f"{model.base_model_prefix}."
    names = {name for name, _ in model.named_modules()}

    def here(name: str) -> str:  # a model without its head lacks a prefix, and the other way round
        return next((n for n in (name, name.removeprefix(prefix), prefix + name) if n in names), name)

    configs = {here(name): config_from_dict(values) for name, values in record.items()}
    sparsify_(model, {name: dataclasses.replace(config, init="fresh") for name, config in configs.items()})
