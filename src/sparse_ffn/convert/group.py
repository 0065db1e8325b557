"""Group: the FFNs of a model that become one layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_ffn.convert.config_base import FFNConfig
from sparse_ffn.convert.curve import Point
from sparse_ffn.convert.find.found import Found
from sparse_ffn.convert.init.build import Built, build, settle
from sparse_ffn.ops.autocast import without_autocast


class Group:
    """FFNs of the same parameters, with what they become: most often one FFN.

    Args:
        config: what they become.
    """

    def __init__(self, config: FFNConfig) -> None:
        self.config = config
        self.members: list[Found] = []
        self.curve: tuple[Point, ...] = ()
        """What they lose with fewer or more units, if that was measured."""
        self._rows: dict[str, Tensor] = {}

    def add(self, f: Found, rows: Tensor | None) -> None:
        """A member, with its calibration [T, d_model]."""
        self.members.append(f)
        if rows is not None:
            self._rows[f.name] = rows

    def rows_of(self, f: Found) -> Tensor | None:
        """A member's calibration."""
        return self._rows.get(f.name)

    @property
    def rows(self) -> Tensor | None:
        """The calibration of all."""
        return torch.cat(list(self._rows.values())) if self._rows else None

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """What is made within is computed in the FFN's own dtype, and errors say which FFN they are about."""
        f = self.members[0]
        try:
            with without_autocast(f.ups[0].weight):  # autocast is for the model's batches
                yield
        except (ValueError, TypeError) as error:
            what = f"{f.name or 'the FFN'} ({f.pattern}, d_ff = {f.weights().d_ff})"
            raise type(error)(f"{what}: {error}") from error

    def settle(self) -> None:
        """Replace what the config leaves to calibration, but the shares of the units."""
        with self.at_work():
            self.config = settle(self.config, self.members[0].weights(), self.rows)

    def make(self) -> Built:
        """The layer, without touching the model."""
        f = self.members[0]
        with self.at_work():
            built = build(self.config, f.weights(), self.rows, f.out_dropout)
        built.module.train(f.module.training)
        return built
