"""Conversion: the FFNs of existing models become sparse layers, with their weights, and go back."""

from sparse_ffn.convert.calibrate import calibrate as calibrate
from sparse_ffn.convert.config import DenseFFNConfig as DenseFFNConfig
from sparse_ffn.convert.config import FFNConfig as FFNConfig
from sparse_ffn.convert.config import ProductKeyMemoryConfig as ProductKeyMemoryConfig
from sparse_ffn.convert.config import TopKFFNConfig as TopKFFNConfig
from sparse_ffn.convert.config import config_from_dict as config_from_dict
from sparse_ffn.convert.config_experts import ExpertsConfig as ExpertsConfig
from sparse_ffn.convert.config_experts import LowRankMoEConfig as LowRankMoEConfig
from sparse_ffn.convert.config_experts import MoEConfig as MoEConfig
from sparse_ffn.convert.config_experts import NoisyTopKMoEConfig as NoisyTopKMoEConfig
from sparse_ffn.convert.config_experts import SBaseMoEConfig as SBaseMoEConfig
from sparse_ffn.convert.config_experts import SigmaMoEConfig as SigmaMoEConfig
from sparse_ffn.convert.config_experts import SoftmaxMoEConfig as SoftmaxMoEConfig
from sparse_ffn.convert.config_experts import SwitchMoEConfig as SwitchMoEConfig
from sparse_ffn.convert.config_of import config_of as config_of
from sparse_ffn.convert.init.build import ConstantInput as ConstantInput
from sparse_ffn.convert.report import Replacement as Replacement
from sparse_ffn.convert.report import Report as Report
from sparse_ffn.convert.sparsify import from_dense as from_dense
from sparse_ffn.convert.sparsify import sparsify_ as sparsify_
from sparse_ffn.convert.to_dense import to_dense as to_dense
