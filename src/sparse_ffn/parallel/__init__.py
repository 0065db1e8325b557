"""Layers that several processes share, on torch.distributed: a DeviceMesh, DTensors and ``parallelize_module``."""

from sparse_ffn.parallel import exchanges as exchanges  # registers them
from sparse_ffn.parallel.clip import clip_grad_norm_ as clip_grad_norm_
from sparse_ffn.parallel.exchange import Exchange as Exchange
from sparse_ffn.parallel.exchange import register_exchange as register_exchange
from sparse_ffn.parallel.expert import ExpertParallel as ExpertParallel
from sparse_ffn.parallel.hidden import HiddenParallel as HiddenParallel
from sparse_ffn.parallel.memory import MemoryParallel as MemoryParallel
from sparse_ffn.parallel.plan import ddp_ignore as ddp_ignore
from sparse_ffn.parallel.plan import plan as plan
from sparse_ffn.parallel.plan import shard_placement_fn as shard_placement_fn
from sparse_ffn.parallel.traffic import Traffic as Traffic
from sparse_ffn.parallel.traffic import traffic as traffic
