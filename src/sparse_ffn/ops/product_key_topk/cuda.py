"""Product-key top-k on the backend "cuda": csrc/cuda has no kernel for it, so torch sorts."""

from sparse_ffn.ops.product_key_topk.torch import backward as backward
from sparse_ffn.ops.product_key_topk.torch import forward as forward
