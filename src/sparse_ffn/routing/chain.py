"""RouterChain: a recurrent state that carries what one layer's router knew to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn.checks import check_count, check_device, check_dtype, check_floating, check_places, check_positive
from sparse_ffn.module import is_plain, unwrapped
from sparse_ffn.ops.autocast import without_autocast


class RouterChain(nn.Module):
    """h_i = GRU(P_i x_i, h_{i-1}): a router's state that runs through the layers (RMoE, arXiv 2408.06793, section 3).

    One for a model; each of its layers has ``d_router = d_state`` and takes the state as ``router_input``. Nothing is
    kept between calls, so that checkpointing and compilers need not know of it. The state is fp32 at least, under
    autocast too, as all routing. Parameters: ``projections.{i}.weight`` [d_state, d_model], one for each layer, and the
    ``gru``'s, which the layers share.

    Args:
        d_model: width of the tokens.
        d_state: width of the state; 128 in the paper.
        n_layers: layers with a router.
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: a size below 1.
        TypeError: an argument of a wrong type.
    """

    def __init__(
        self, d_model: int, d_state: int, n_layers: int, *, device: Any = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.d_model, self.d_state = check_positive("d_model", d_model), check_positive("d_state", d_state)
        self.n_layers = check_positive("n_layers", n_layers)
        check_device(device)
        check_dtype(dtype)
        own = {"device": device, "dtype": dtype}
        self.projections = nn.ModuleList(
            nn.Linear(self.d_model, self.d_state, bias=False, **own) for _ in range(self.n_layers)
        )
        self.gru = nn.GRUCell(self.d_state, self.d_state, **own)

    def forward(self, x: Tensor, state: Tensor | None, layer: int) -> Tensor:
        """The next state.

        Args:
            x: [..., d_model], what the layer's experts see or what a router would, of any float dtype.
            state: [..., d_state], what this returned for the layer before; None for the first: zeros.
            layer: which one, in [0, n_layers).

        Returns:
            [..., d_state] in fp32, or fp64 if the chain has that.

        Raises:
            TypeError: x or state is no dense floating tensor, or layer no int.
            ValueError: a wrong shape or device.
            IndexError: there is no such layer.
        """
        check_floating("x", x)
        if not x.dim() or x.shape[-1] != self.d_model:
            raise ValueError(f"x must have shape [..., d_model = {self.d_model}], got {list(x.shape)}")
        if check_count("layer", layer) >= self.n_layers:
            raise IndexError(f"layer must be in [0, n_layers = {self.n_layers}), got {layer}")
        projection, gru = self.projections[layer], self.gru
        plain = (
            type(projection) is nn.Linear and is_plain(projection),
            type(gru) is nn.GRUCell and is_plain(gru, "weight_hh"),
        )
        for part, is_one in zip((projection, gru), plain, strict=True):
            if is_one:
                check_places(x, dict(part.named_parameters()))
        shape = (*x.shape[:-1], self.d_state)
        if state is not None:
            check_floating("state", state)
            if state.shape != shape:
                raise ValueError(f"state must have shape {list(shape)}, d_state last, got {list(state.shape)}")
            if state.device != x.device:
                raise ValueError(f"state is on {state.device}, x is on {x.device}")
        wide = torch.promote_types(self._dtype, torch.float32)
        with without_autocast(x):
            # pruned, parametrised, with LoRA or offloaded parts: whatever they are now, they compute what they do
            if plain[0]:
                seen = F.linear(x.to(wide), projection.weight.to(wide))  # type: ignore[arg-type]
            else:
                seen = projection(x.to(self._dtype)).to(wide)
            state = seen.new_zeros(shape) if state is None else state.to(wide)
            flat = (seen.reshape(-1, self.d_state), state.reshape(-1, self.d_state))
            if plain[1]:
                own = (gru.weight_ih, gru.weight_hh, gru.bias_ih, gru.bias_hh)
                new = torch.gru_cell(*flat, *(parameter.to(wide) for parameter in own))
            else:
                new = gru(*(part.to(self._dtype) for part in flat)).to(wide)
        return new.view(shape)

    @property
    def _dtype(self) -> torch.dtype:
        return unwrapped("gru", self.gru, nn.GRUCell).weight_hh.dtype

    def extra_repr(self) -> str:
        """The sizes."""
        return f"{self.d_model}, d_state={self.d_state}, n_layers={self.n_layers}"
