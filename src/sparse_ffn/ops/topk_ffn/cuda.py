"""TopKFFN on the backend "cuda": csrc/cuda has no kernels for it, so torch's products compute."""

from sparse_ffn.ops.topk_ffn.torch import backward as backward
from sparse_ffn.ops.topk_ffn.torch import forward as forward
