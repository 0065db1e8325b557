"""ProductKeyMemory: n² hidden units found through two tables of n sub-keys."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_ffn import ops
from sparse_ffn.checks import check_choice, check_finite, check_flag, check_places, check_positive, is_dtensor
from sparse_ffn.layers.base import SparseFFN
from sparse_ffn.layers.data_parallel import check_no_ddp
from sparse_ffn.layers.projection import Projection, Query
from sparse_ffn.module import is_plain, unwrapped
from sparse_ffn.ops.activations import ACTIVATIONS, activate
from sparse_ffn.ops.autocast import without_autocast

# einops notes each type of tensor that it meets, and torch.compile would compile a layer again when it has
for _known in (torch.empty(1), nn.Parameter(torch.empty(1))):
    rearrange(_known, "n -> n")


class ProductKeyMemory(SparseFFN):
    """Sum over heads of act(score)·values over the k best of n² product keys (arXiv 2310.10837, Eq. 8; 1907.05242).

    Unit i = i_first·n + i_second has score sub_keys[0, h, i_first]·q_first + sub_keys[1, h, i_second]·q_second, where
    q_first and q_second are the halves of x, or of a learned query. The values are shared by all heads; one that two
    heads select counts twice. The search is exact.

    Parameters: ``sub_keys`` [2, n_heads, n, query_dim/2], ``values`` [n², d_out], with ``query_dim``
    ``query.weight`` [n_heads·query_dim, d_model], with ``query_bias`` ``query.bias`` [n_heads·query_dim]; with
    ``norm_affine`` ``norm_weight`` and, but for ``"rms"``, ``norm_bias`` [half a query]; with ``experts`` ``keys``
    [n², d_model]; with ``gated`` ``gate.weight`` [d_out, d_model] and ``out.weight`` [d_out, d_out].

    Args:
        d_model: input width; even unless ``query_dim`` is given.
        n_sub_keys: n.
        k: values read by a head, 1 <= k <= n².
        n_heads: heads.
        activation: of the scores; see ``SparseFFN``. ``"relu"`` is the paper's; ``"softmax"``, over the k selected
            scores of each head, is the original memory's.
        query_dim: width of a learned query for each head (even); None uses x itself, as in the paper.
        query_bias: give the learned query a bias, as the original memory has it.
        query_norm: normalise each half of the query: ``"layer"`` or ``"rms"``.
        norm_affine: scale and shift (``"rms"``: scale) what is normalised, by parameters that all halves share.
        value_init: ``"paper"`` for values of standard deviation c/n, ``"standard"`` for c/sqrt(d_model).
        sparse_grad: the gradient of ``values`` is a sparse tensor of the rows that were read, for large tables and
            torch.optim.SparseAdam. Not under torch.compile, nor for a table that DDP or FSDP2 reduces.
        experts: each unit has a key of its own beside its product key: it weighs the softmax of the head's k scores
            times act(keys_u·x), where ``activation`` is now of that product (PEER, 2407.04153).
        gated: gate what was read, and project it: out(silu(gate x) ⊙ y) (Memory+, 2412.09764, section 3).
        d_out: output width.
        dropout: on the weights of the selected values.
        init_scale: c; sub-keys have standard deviation c/sqrt(query_dim or d_model), the query c/sqrt(d_model), gate
            and out 1/sqrt(input width), so that a gate does not change how the output's scale depends on c.
        n_layers: sets c = sqrt(2/n_layers).
        device: where the parameters live.
        dtype: their dtype.

    Raises:
        ValueError: k > n², an odd query, a bias or a scale of what there is not, ``experts`` with ``sparse_grad`` or
            with ``"softmax"``, or an argument outside its range.
    """

    gate: nn.Linear | None
    out: nn.Linear | None

    def __init__(
        self,
        d_model: int,
        n_sub_keys: int,
        k: int,
        *,
        n_heads: int = 1,
        activation: str = "relu",
        query_dim: int | None = None,
        query_bias: bool = False,
        query_norm: str | None = None,
        norm_affine: bool = False,
        value_init: str = "paper",
        sparse_grad: bool = False,
        experts: bool = False,
        gated: bool = False,
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
        self.n_sub_keys, self.n_heads = check_positive("n_sub_keys", n_sub_keys), check_positive("n_heads", n_heads)
        check_choice("value_init", value_init, ("paper", "standard"))
        query_bias = check_flag("query_bias", query_bias)
        norm_affine = check_flag("norm_affine", norm_affine)
        if query_bias and query_dim is None:
            raise ValueError("query_bias = True needs query_dim: x itself is the query, and has no bias")
        width = self.d_model if query_dim is None else check_positive("query_dim", query_dim)
        if width % 2:
            name, hint = ("d_model", "; or give an even query_dim") if query_dim is None else ("query_dim", "")
            raise ValueError(f"{name} must be even, since each half meets its own sub-keys, got {width}{hint}")
        self.d_ff = self.n_sub_keys**2
        self.k = k
        self.query_dim, self.query_bias = None if query_dim is None else width, query_bias
        self.norm_affine = norm_affine
        self.query_norm = query_norm
        self.value_init, self.sparse_grad = value_init, check_flag("sparse_grad", sparse_grad)
        self.experts, self.gated = check_flag("experts", experts), check_flag("gated", gated)
        if self.experts and (self.sparse_grad or activation == "softmax"):
            wrong = "sparse_grad = True" if self.sparse_grad else "activation = 'softmax'"
            raise ValueError(f"experts = True and {wrong} do not fit: its gradients are dense, its gates softmaxes")
        self._activations = (*ACTIVATIONS, *(() if self.experts else ("softmax",)))
        self.sub_keys = self._parameter(2, self.n_heads, self.n_sub_keys, width // 2)
        query = (self.d_model, self.n_heads * width, self.init_scale)
        self.query = None if query_dim is None else Query(*query, bias=query_bias, **self._factory)
        self.norm_weight = self._parameter(width // 2) if norm_affine else None
        self.norm_bias = self._parameter(width // 2) if norm_affine and query_norm == "layer" else None
        self.keys = self._parameter(self.d_ff, self.d_model) if self.experts else None
        self.values = self._parameter(self.d_ff, self.d_out)
        for name, width in (("gate", self.d_model), ("out", self.d_out)):
            made = Projection(width, self.d_out, **self._factory) if self.gated else None
            setattr(self, name, made)
        self.reset_parameters()

    @property
    def k(self) -> int:
        """Values read by a head. May be set to any number up to n_sub_keys² at any time."""
        return self._k

    @k.setter
    def k(self, k: int) -> None:
        self._k = check_positive("k", k, at_most=self.n_sub_keys**2, limit="n_sub_keys²")

    @property
    def query_norm(self) -> str | None:
        """How each half of the query is normalised; may be set where that has no parameters."""
        return self._query_norm

    @query_norm.setter
    def query_norm(self, query_norm: str | None) -> None:
        if query_norm is not None:
            check_choice("query_norm", query_norm, ("layer", "rms"))
        if self.norm_affine and query_norm is None:
            raise ValueError("norm_affine = True needs query_norm, 'layer' or 'rms'")
        if self.norm_affine and query_norm != getattr(self, "_query_norm", query_norm):
            raise ValueError(
                f"query_norm is {self.query_norm!r}, whose parameters norm_affine = True made: make a new layer"
            )
        self._query_norm = query_norm

    def reset_parameters(self) -> None:
        """Normal query, sub-keys and values; no bias yet, and scales of 1."""
        self._normal(self.sub_keys, 2 * self.sub_keys.shape[-1])
        self._normal(self.values, self.d_ff if self.value_init == "paper" else self.d_model)
        if self.keys is not None:
            self._normal(self.keys, self.d_model)
        for name in ("gate", "out", "query"):
            if (linear := getattr(self, name)) is not None:
                unwrapped(name, linear, nn.Linear).reset_parameters()
        if self.norm_weight is not None:
            nn.init.ones_(self.norm_weight)
        if self.norm_bias is not None:
            nn.init.zeros_(self.norm_bias)

    def _forward(self, x: Tensor, mask: Tensor | None, router_input: Tensor) -> Tensor:
        # T tokens, H heads, N sub-keys, C half a query, K selected values
        x = x.reshape(-1, self.d_model)
        values, sub_keys, half = self.values, self.sub_keys.shape, self._width // 2
        n = sub_keys[2] if len(sub_keys) == 4 else 0
        norms = [t for t in (self.norm_weight, self.norm_bias) if t is not None]
        if (
            sub_keys != (2, self.n_heads, n, half)
            or values.shape != (n * n, self.d_out)
            or (self.keys is not None and self.keys.shape != (n * n, self.d_model))
            or any(t.shape != (half,) for t in norms)
            or (self.gated and any(t is not None and t.shape != shape for t, shape in self._output_gate().values()))
        ):
            raise self._shape_error()
        score_THK, index_THK = ops.product_key_topk(self._scores(x), self.k)
        if self.activation == "softmax" or self.keys is not None:
            weight_THK = torch.softmax(score_THK, dim=-1)
        else:
            weight_THK = activate(self.activation, score_THK)
        weight_THK = F.dropout(weight_THK, self.dropout, self.training)
        y = self._read(x, values, index_THK.flatten(1), weight_THK.flatten(1))
        return y if self.out is None or self.gate is None else self.out(F.silu(self.gate(x)) * y)

    def _read(self, x: Tensor, values: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """What the selected units add: [T, d_out]."""
        if self.keys is None:
            return self._bag(values, index_TK, weight_TK)
        units = ops.Units(self.keys.unsqueeze(1), values.unsqueeze(1), None, None)  # experts of one unit
        return ops.expert_ffn(x, units, index_TK, weight_TK, activation=self.activation)

    def _bag(self, values: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """Weighted sums of the selected values: [T, d_out]."""
        if self._split is not None:
            return self._split.bag(values, index_TK, weight_TK)  # type: ignore[no-any-return]
        if self.sparse_grad:
            check_no_ddp(values)
        return ops.weighted_bag(values, index_TK, weight_TK, sparse_grad=self.sparse_grad)

    def __setattr__(self, name: str, value: Any) -> None:
        """As SparseFFN's; a table that FSDP2 shards must have a dense gradient."""
        if name == "values" and is_dtensor(value) and self.sparse_grad:
            raise TypeError(
                "values cannot be sharded by FSDP2 with sparse_grad=True, since it reduces dense gradients only: take "
                "sparse_grad=False, or leave the table to each process with fully_shard(ignored_params={layer.values})"
            )
        super().__setattr__(name, value)

    def _scores(self, x: Tensor) -> Tensor:
        """Scores of the two halves' sub-keys [T, H, 2, N], in fp32 at least under any autocast."""
        with without_autocast(x):
            if self.query is None:  # all heads see x: one product for each half
                query_TSC = self._affine(ops.normalise(rearrange(x, "t (s c) -> t s c", s=2), self.query_norm))
                score_STM = ops.wide_product(query_TSC.transpose(0, 1), self.sub_keys.flatten(1, 2))
                return rearrange(score_STM, "s t (h n) -> t h s n", h=self.n_heads)
            own = isinstance(self.query, Query)
            plain = type(self.query) is Query and is_plain(self.query)
            if plain:
                check_places(x, {"query.weight": self.query.weight, "query.bias": self.query.bias})
                self._check_query(self.query)
            if plain and self.query.bias is None:
                query_TBC = ops.normalised_product(x, self.query.weight, 2 * self.n_heads, self.query_norm)
            else:  # with hooks, quantised, pruned, parametrised, with LoRA: whatever it is now, it computes the query
                query_TM = self.query(x if own else x.to(self.values.dtype))
                if query_TM.shape[1:] != (self.n_heads * self._width,):
                    raise ValueError(
                        f"query must give [tokens, {self.n_heads * self._width}], got {list(query_TM.shape)}"
                    )
                query_TBC = ops.normalise(rearrange(query_TM, "t (b c) -> t b c", b=2 * self.n_heads), self.query_norm)
            sub_keys_BNC = rearrange(self.sub_keys, "s h n c -> (h s) n c")
            score_BTN = ops.wide_product(self._affine(query_TBC).transpose(0, 1), sub_keys_BNC)
            return rearrange(score_BTN, "(h s) t n -> t h s n", s=2)

    def _affine(self, query: Tensor) -> Tensor:
        """Normalised halves of queries [..., C], scaled and shifted."""
        if self.norm_weight is not None:
            query = query * self.norm_weight
        return query if self.norm_bias is None else query + self.norm_bias

    def _check_query(self, query: nn.Linear) -> None:
        rows = self.n_heads * self._width
        if query.weight.shape != (rows, self.d_model) or (query.bias is not None and query.bias.shape != (rows,)):
            raise self._shape_error()

    @property
    def _width(self) -> int:
        """Of a head's query."""
        return self.d_model if self.query_dim is None else self.query_dim

    def _tensors(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        query = self.query if type(self.query) is Query else None  # others may store it packed
        rows, half = self.n_heads * self._width, (self._width // 2,)
        return {
            "sub_keys": (self.sub_keys, (2, self.n_heads, self.n_sub_keys, *half)),
            "query.weight": (None if query is None else query.weight, (rows, self.d_model)),
            "query.bias": (None if query is None else query.bias, (rows,)),
            "norm_weight": (self.norm_weight, half),
            "norm_bias": (self.norm_bias, half),
            "keys": (self.keys, (self.d_ff, self.d_model)),
            "values": (self.values, (self.d_ff, self.d_out)),
            **self._output_gate(),
        }

    def _output_gate(self) -> dict[str, tuple[Tensor | None, tuple[int, ...]]]:
        pairs = (("gate", self.gate, self.d_model), ("out", self.out, self.d_out))
        return {
            f"{name}.weight": (linear.weight if type(linear) is Projection else None, (self.d_out, width))
            for name, linear, width in pairs
        }

    def param_groups(self, values_lr: float, **options: Any) -> list[dict[str, Any]]:
        """Optimizer parameter groups: the value table with a learning rate of its own, then all other parameters.

        Args:
            values_lr: learning rate of ``values``: each row is read by few tokens and may want a higher one.
            **options: further options of the value table's group, e.g. ``weight_decay=0.0``.

        Raises:
            ValueError: the rate is not finite or below 0.
        """
        check_finite("values_lr", values_lr)
        table: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():  # weight norm and pruning make others of values
            own = name in ("values", "values_g", "values_v", "values_orig")
            (table if own or name.startswith("parametrizations.values.") else others).append(parameter)
        return [{"params": table, "lr": values_lr, **options}, {"params": others}]

    @property
    def active_fraction(self) -> float:
        """n_heads·k/n², at most 1."""
        return min(1.0, self.n_heads * self.k / self.d_ff)

    def flops_per_token(self) -> int:
        """Sub-key scores, values read, and the learned query, units' keys and the gate if any."""
        width = 2 * self.sub_keys.shape[-1]
        query = 0 if self.query is None else 2 * self.d_model * self.n_heads * width
        read = self.d_out + (self.d_model if self.experts else 0)
        gate = 2 * self.d_out * (self.d_model + self.d_out) if self.gated else 0
        return query + gate + 2 * self.n_heads * (self.n_sub_keys * width + self.k * read)

    def extra_repr(self) -> str:
        """Sizes and what differs from the defaults."""
        return self._repr_options(
            f"n_sub_keys={self.n_sub_keys}",
            f"k={self.k}",
            n_heads=(self.n_heads, 1),
            activation=(self.activation, "relu"),
            query_dim=(self.query_dim, None),
            query_bias=(self.query_bias, False),
            query_norm=(self.query_norm, None),
            norm_affine=(self.norm_affine, False),
            value_init=(self.value_init, "paper"),
            sparse_grad=(self.sparse_grad, False),
            experts=(self.experts, False),
            gated=(self.gated, False),
        )
