"""Layers that several processes share, on torch.distributed: a DeviceMesh, DTensors and ``parallelize_module``."""

from sparse_ffn.parallel import exchanges as exchanges
from sparse_ffn.parallel.exchange import Exchange as Exchange
from sparse_ffn.parallel.exchange import register_exchange as register_exchange
from sparse_ffn.parallel.expert import ExpertParallel as ExpertParallel
