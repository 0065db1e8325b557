"""The experts of transformers' models quantised or offloaded: where they are, and how a config says what is stored."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import nn

from sparse_ffn.backends.warning import SparseFFNWarning
from sparse_ffn.checks import shown
from sparse_ffn.compress.config import ExpertQuantization
from sparse_ffn.compress.quantizer import empty
from sparse_ffn.compress.stacks import CHANGED, KINDS, Stack, experts_of
from sparse_ffn.integrations.experts import NAME, dispatches, register, stack_names, stores_rows
from sparse_ffn.layers.rows import ExpertRows, QuantizedRows

KEY = "sparse_ffn_experts"  # of the record in config.json


def teach() -> None:
    """Let ``quantize_experts_`` and ``offload_experts_`` find these experts too. Calling this again changes nothing."""
    if _stacks not in KINDS:
        KINDS.append(_stacks)
        CHANGED.append(prepare)


def _is_experts(module: nn.Module) -> bool:
    return dispatches(module) and all(
        isinstance(held, ExpertRows) or (isinstance(held, torch.Tensor) and held.dim() == 3)
        for held in (getattr(module, name, None) for name in stack_names(module))
    )


def _stacks(experts: Any) -> list[Stack]:
    if not _is_experts(experts):
        return []
    up, down = stack_names(experts)
    transposed = bool(experts.is_transposed)
    return [Stack(experts, up, transposed=transposed), Stack(experts, down, is_values=True, transposed=not transposed)]


def prepare(model: nn.Module) -> None:
    """Choose our implementation, which computes with stored rows, and write into the configs what is stored."""
    written: list[Any] = []
    stored = False
    for part in model.modules():  # a model comes before those within it, which may share its config
        if stores_rows(part):
            register()
            stored = True
            part.config._experts_implementation = NAME  # type: ignore[union-attr]
        if isinstance(part, transformers.PreTrainedModel) and not any(part.config is config for config in written):
            written.append(part.config)
            found = facts(part)
            if found or getattr(part.config, KEY, None):
                setattr(part.config, KEY, found)
    if stored and not written:
        warnings.warn(
            f"a {type(model).__name__} is no model of transformers, in whose config it would be written that these "
            "experts are stored rows: to save the model that it is a part of, change the experts of the whole",
            SparseFFNWarning,
            stacklevel=6,  # beyond whoever tells this, and its decorators
        )


def facts(model: nn.Module) -> dict[str, dict[str, dict[str, Any]]]:
    """By the name of a module and of a stack what its rows are stored in: as ``ExpertQuantization`` calls it."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for name, _, stacks in experts_of(model):
        for stack in stacks:
            rows = stack.held
            codes = rows.codes if isinstance(rows, ExpertRows) else None
            if codes is not None:
                group = codes.shape[-1] // codes.scale.shape[-1]
                fact = {"bits": codes.bits, "group_size": group, "symmetric": codes.zero_point is None}
                found.setdefault(name, {})[stack.name] = fact
                rows._is_hf_initialized = True  # transformers draws no weights for it
    return found


def store(model: nn.Module, record: Any, places_of: Callable[[Any], dict[str, Any]]) -> None:
    """Put empty codes where a record says that a model's experts are stored, for weights that are loaded afterwards.

    ``places_of`` gives a record the names that the model has.

    Raises:
        ValueError: the record is damaged or of another model.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{KEY} must map names of modules to what is stored, got {shown(record)}")
    places = {name: stacks for name, _, stacks in experts_of(model)}
    for name, stacks in places_of(record).items():
        held = {stack.name: stack for stack in places.get(name, ())}
        if not isinstance(stacks, Mapping) or not held.keys() >= stacks.keys():
            raise ValueError(f"{KEY} says that {shown(stacks)} of {name!r} are stored, which the model does not have")
        for stack, fact in stacks.items():
            try:
                config = ExpertQuantization(**fact)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{KEY}, {stack} of {name}: {error}") from error
            rows = held[stack].rows()
            group = config.group_of(rows.shape[-1], config.bits)
            held[stack].store(QuantizedRows(empty(rows, config.bits, group, config.symmetric_at(config.bits))))
    facts(model)
