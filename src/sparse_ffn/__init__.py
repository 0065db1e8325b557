"""sparse-ffn: sparse feed-forward layers for PyTorch."""

from sparse_ffn import functional as functional
from sparse_ffn.backends.choice import SparseFFNWarning as SparseFFNWarning
from sparse_ffn.backends.choice import backend as backend
from sparse_ffn.compress import ExpertQuantization as ExpertQuantization
from sparse_ffn.compress import dequantize_experts_ as dequantize_experts_
from sparse_ffn.compress import quantize_experts_ as quantize_experts_
from sparse_ffn.convert import DenseFFNConfig as DenseFFNConfig
from sparse_ffn.convert import MoEConfig as MoEConfig
from sparse_ffn.convert import NoisyTopKMoEConfig as NoisyTopKMoEConfig
from sparse_ffn.convert import ProductKeyMemoryConfig as ProductKeyMemoryConfig
from sparse_ffn.convert import SBaseMoEConfig as SBaseMoEConfig
from sparse_ffn.convert import SigmaMoEConfig as SigmaMoEConfig
from sparse_ffn.convert import SoftmaxMoEConfig as SoftmaxMoEConfig
from sparse_ffn.convert import SwitchMoEConfig as SwitchMoEConfig
from sparse_ffn.convert import TopKFFNConfig as TopKFFNConfig
from sparse_ffn.convert import calibrate as calibrate
from sparse_ffn.convert import from_dense as from_dense
from sparse_ffn.convert import sparsify_ as sparsify_
from sparse_ffn.convert import to_dense as to_dense
from sparse_ffn.layers import DenseFFN as DenseFFN
from sparse_ffn.layers import MoE as MoE
from sparse_ffn.layers import NoisyTopKMoE as NoisyTopKMoE
from sparse_ffn.layers import ProductKeyMemory as ProductKeyMemory
from sparse_ffn.layers import SBaseMoE as SBaseMoE
from sparse_ffn.layers import SigmaMoE as SigmaMoE
from sparse_ffn.layers import SoftmaxMoE as SoftmaxMoE
from sparse_ffn.layers import SparseFFN as SparseFFN
from sparse_ffn.layers import SwitchMoE as SwitchMoE
from sparse_ffn.layers import TopKFFN as TopKFFN
from sparse_ffn.sizing import parameter_equal as parameter_equal
from sparse_ffn.training import aux_loss as aux_loss
from sparse_ffn.training import routing_stats as routing_stats
from sparse_ffn.training import update_router_bias as update_router_bias

__version__ = "0.1.0"
