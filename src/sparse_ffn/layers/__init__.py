"""The layers: one concept a file."""

from sparse_ffn.layers.base import SparseFFN as SparseFFN
from sparse_ffn.layers.dense import DenseFFN as DenseFFN
from sparse_ffn.layers.latent import LatentMoE as LatentMoE
from sparse_ffn.layers.low_rank import LowRankMoE as LowRankMoE
from sparse_ffn.layers.mixed import MixedMoE as MixedMoE
from sparse_ffn.layers.moe import MoE as MoE
from sparse_ffn.layers.product_key import ProductKeyMemory as ProductKeyMemory
from sparse_ffn.layers.shared_expert import SharedExpertMoE as SharedExpertMoE
from sparse_ffn.layers.switch_head import SwitchHeadAttention as SwitchHeadAttention
from sparse_ffn.layers.topk import TopKFFN as TopKFFN
from sparse_ffn.layers.variants import NoisyTopKMoE as NoisyTopKMoE
from sparse_ffn.layers.variants import SBaseMoE as SBaseMoE
from sparse_ffn.layers.variants import SigmaMoE as SigmaMoE
from sparse_ffn.layers.variants import SoftmaxMoE as SoftmaxMoE
from sparse_ffn.layers.variants import SwitchMoE as SwitchMoE
