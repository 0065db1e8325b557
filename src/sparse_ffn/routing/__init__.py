"""Routing: routers (scores to gates), balance losses, statistics. Torch, and ops that save launches; fp32 at least."""

from sparse_ffn.routing.balance import balance_loss as balance_loss
from sparse_ffn.routing.base import Router as Router
from sparse_ffn.routing.base import Routing as Routing
from sparse_ffn.routing.chain import RouterChain as RouterChain
from sparse_ffn.routing.deepseek import DeepSeekRouter as DeepSeekRouter
from sparse_ffn.routing.longcat import LongCatRouter as LongCatRouter
from sparse_ffn.routing.relu import ReLURouter as ReLURouter
from sparse_ffn.routing.routers import ROUTERS as ROUTERS
from sparse_ffn.routing.routers import NoisyTopKRouter as NoisyTopKRouter
from sparse_ffn.routing.routers import SigmoidRouter as SigmoidRouter
from sparse_ffn.routing.routers import SinkhornRouter as SinkhornRouter
from sparse_ffn.routing.routers import SoftmaxRouter as SoftmaxRouter
from sparse_ffn.routing.routers import SoftmaxTopKRouter as SoftmaxTopKRouter
from sparse_ffn.routing.routers import UnweightedRouter as UnweightedRouter
