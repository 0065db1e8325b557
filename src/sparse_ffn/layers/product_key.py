"""ProductKeyMemory: n² hidden units found through two tables of n sub-keys."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, check_places, check_positive
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.ops.activations import activate
from sparse_ffn.ops.autocast import without_autocast
from sparse_ffn.plain import is_plain

# einops notes each type of tensor that it meets, and torch.compile would compile a layer again when it has
for _known in (torch.empty(1), nn.Parameter(torch.empty(1))):
    rearrange(_known, "n -> n")


class ProductKeyMemory(SparseFFN):
    """Sum over heads of act(score)·values over the k best of n² product keys (arXiv 2310.10837, Eq. 8; 1907.05242).

    Unit i = i_first·n + i_second has score sub_keys[0, h, i_first]·q_first + sub_keys[1, h, i_second]·q_second, where
    q_first and q_second are the halves of x, or of a learned query. The values are shared by all heads; one that two
    heads select counts twice. The search is exact.

    Parameters: ``sub_keys`` [2, n_heads, n, query_dim/2], ``values`` [n², d_out], with ``query_dim``
    ``query.weight`` [n_heads·query_dim, d_model].

    Args:
        d_model: input width; even unless ``query_dim`` is given.
        n_sub_keys: n.
        k: values read by a head, 1 <= k <= n².
        n_heads: heads.
        activation: of the scores; see ``SparseFFN``. ``"relu"`` is the paper's; ``"softmax"``, over the k selected
            scores of each head, is the original memory's.
        query_dim: width of a learned query for each head (even); None uses x itself, as in the paper.
        query_norm: normalise each half of the query without learned parameters: ``"layer"`` or ``"rms"``.
        value_init: ``"paper"`` for values of standard deviation c/n, ``"standard"`` for c/sqrt(d_model).
        sparse_grad: the gradient of ``values`` is a sparse tensor of the rows that were read, for large tables and
            torch.optim.SparseAdam. Not under torch.compile.
        d_out: output width.
        dropout: on the weights of the selected values.
        init_scale: c; sub-keys have standard deviation c/sqrt(query_dim or d_model), the query c/sqrt(d_model).
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: k > n², an odd query, or an argument outside its range.
    """

    def __init__(
        self,
        d_model: int,
        n_sub_keys: int,
        k: int,
        *,
        n_heads: int = 1,
        activation: str = "relu",
        query_dim: int | None = None,
        query_norm: str | None = None,
        value_init: str = "paper",
        sparse_grad: bool = False,
        d_out: int | None = None,
        dropout: float = 0.0,
        init_scale: float = 1.0,
        n_layers: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            d_model, d_out=d_out, activation=activation, dropout=dropout, init_scale=init_scale, n_layers=n_layers,
            bias=False, device=device, dtype=dtype, extra_activations=("softmax",),
        )  # fmt: skip
        check_positive("n_sub_keys", n_sub_keys)
        check_positive("n_heads", n_heads)
        check_choice("value_init", value_init, ("paper", "standard"))
        if query_norm is not None:
            check_choice("query_norm", query_norm, ("layer", "rms"))
        width_name = "d_model" if query_dim is None else "query_dim"
        width = d_model if query_dim is None else query_dim
        check_positive(width_name, width)
        if width % 2:
            hint = "; or give an even query_dim" if query_dim is None else ""
            raise ValueError(f"{width_name} must be even, since each half meets its own sub-keys, got {width}{hint}")
        self.n_sub_keys, self.n_heads, self.d_ff = n_sub_keys, n_heads, n_sub_keys**2
        self.k = k
        self.query_dim, self.query_norm = query_dim, query_norm
        self.value_init, self.sparse_grad = value_init, sparse_grad
        self.sub_keys = self._parameter(2, n_heads, n_sub_keys, width // 2)
        self.query = None if query_dim is None else nn.Linear(d_model, n_heads * width, bias=False, **self._factory)
        self.values = self._parameter(self.d_ff, self.d_out)
        self.reset_parameters()

    @property
    def k(self) -> int:
        """Values read by a head. May be set to any number up to n_sub_keys² at any time."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        check_positive("k", k, at_most=self.n_sub_keys**2, limit="n_sub_keys²")
        self._k = k

    def reset_parameters(self) -> None:
        """Normal query, sub-keys and values."""
        self._normal(self.sub_keys, 2 * self.sub_keys.shape[-1])
        self._normal(self.values, self.d_ff if self.value_init == "paper" else self.d_model)
        if self.query is not None:
            self._normal(self.query.weight, self.d_model)

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        # T tokens, H heads, N sub-keys, C half a query, K selected values
        x = x.reshape(-1, self.d_model)
        values, sub_keys, half = self.values, self.sub_keys.shape, self._width // 2
        n = sub_keys[2] if len(sub_keys) == 4 else 0
        if sub_keys != (2, self.n_heads, n, half) or values.shape != (n * n, self.d_out):
            raise self._misfit()
        score_THK, index_THK = ops.product_key_topk(self._scores(x), self.k)
        if self.activation == "softmax":
            weight_THK = torch.softmax(score_THK, dim=-1)
        else:
            weight_THK = activate(self.activation, score_THK)
        weight_THK = F.dropout(weight_THK, self.dropout, self.training)
        return ops.weighted_bag(values, index_THK.flatten(1), weight_THK.flatten(1), sparse_grad=self.sparse_grad)

    def _scores(self, x: Tensor) -> Tensor:
        """Scores of the two halves' sub-keys [T, H, 2, N], in fp32 at least under any autocast."""
        with without_autocast(x):
            if self.query is None:  # all heads see x: one product for each half
                query_TSC = ops.normalise(rearrange(x, "t (s c) -> t s c", s=2), self.query_norm)
                score_STM = ops.wide_product(query_TSC.transpose(0, 1), self.sub_keys.flatten(1, 2))
                return rearrange(score_STM, "s t (h n) -> t h s n", h=self.n_heads)
            if type(self.query) is nn.Linear and is_plain(self.query):
                check_places(x, (self.query.weight,))
                if self.query.weight.shape != (self.n_heads * self._width, self.d_model):
                    raise self._misfit()
                query_TBC = ops.normalised_product(x, self.query.weight, 2 * self.n_heads, self.query_norm)
            else:  # quantised, pruned, parametrised, with LoRA: whatever it is now, it computes the query
                query_TM = self.query(x.to(self.values.dtype))
                if query_TM.shape[1:] != (self.n_heads * self._width,):
                    raise ValueError(
                        f"query must give [tokens, {self.n_heads * self._width}], got {list(query_TM.shape)}"
                    )
                query_TBC = ops.normalise(rearrange(query_TM, "t (b c) -> t b c", b=2 * self.n_heads), self.query_norm)
            sub_keys_BNC = rearrange(self.sub_keys, "s h n c -> (h s) n c")
            score_BTN = ops.wide_product(query_TBC.transpose(0, 1), sub_keys_BNC)
            return rearrange(score_BTN, "(h s) t n -> t h s n", s=2)

    @property
    def _width(self) -> int:
        """Of a head's query."""
        return self.d_model if self.query_dim is None else self.query_dim

    def _parts(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        query = self.query.weight if type(self.query) is nn.Linear else None  # others may store it packed
        return {
            "sub_keys": (self.sub_keys, (2, self.n_heads, self.n_sub_keys, self._width // 2)),
            "query.weight": (query, (self.n_heads * self._width, self.d_model)),
            "values": (self.values, (self.d_ff, self.d_out)),
        }

    def param_groups(self, values_lr: float, **options: Any) -> list[dict[str, Any]]:
        """Optimizer parameter groups: the value table with a learning rate of its own, then all other parameters.

        Args:
            values_lr: learning rate of ``values``: each row is read by few tokens, so it usually wants a higher one.
            **options: further options of the value table's group, e.g. ``weight_decay=0.0``.
        """
        others = [p for p in self.parameters() if p is not self.values]
        return [{"params": [self.values], "lr": values_lr, **options}, {"params": others}]

    @property
    def active_fraction(self) -> float:
        """n_heads·k/n², at most 1."""
        return min(1.0, self.n_heads * self.k / self.d_ff)

    def flops_per_token(self) -> int:
        """Sub-key scores, values read, and the learned query if any."""
        width = 2 * self.sub_keys.shape[-1]
        query = 0 if self.query is None else 2 * self.d_model * self.n_heads * width
        return query + 2 * self.n_heads * self.n_sub_keys * width + 2 * self.n_heads * self.k * self.d_out

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        return self._repr_options(
            f"n_sub_keys={self.n_sub_keys}",
            f"k={self.k}",
            n_heads=(self.n_heads, 1),
            activation=(self.activation, "relu"),
            query_dim=(self.query_dim, None),
            query_norm=(self.query_norm, None),
            value_init=(self.value_init, "paper"),
            sparse_grad=(self.sparse_grad, False),
        )
