"""The ops: for each a plain reference that is its contract, and faster ways to meet it."""

from sparse_ffn.ops.codes import Codes as Codes
from sparse_ffn.ops.cvmm.op import cvmm as cvmm
from sparse_ffn.ops.expert_ffn.op import expert_ffn as expert_ffn
from sparse_ffn.ops.library import at_most as at_most
from sparse_ffn.ops.library import in_backward as in_backward
from sparse_ffn.ops.library import under_transforms as under_transforms
from sparse_ffn.ops.product_key_topk.op import product_key_topk as product_key_topk
from sparse_ffn.ops.quantized_cvmm.op import quantized_cvmm as quantized_cvmm
from sparse_ffn.ops.route.op import route as route
from sparse_ffn.ops.route.op import route_available as route_available
from sparse_ffn.ops.routed_ffn.op import routed_ffn as routed_ffn
from sparse_ffn.ops.routed_ffn.op import routed_ffn_available as routed_ffn_available
from sparse_ffn.ops.routed_ffn.op import routed_ffn_inference as routed_ffn_inference
from sparse_ffn.ops.routed_ffn.quantized import quantized_ffn_available as quantized_ffn_available
from sparse_ffn.ops.routed_ffn.quantized import quantized_ffn_inference as quantized_ffn_inference
from sparse_ffn.ops.topk_ffn.op import topk_ffn as topk_ffn
from sparse_ffn.ops.units import Units as Units
from sparse_ffn.ops.weighted_bag.op import weighted_bag as weighted_bag
from sparse_ffn.ops.wide_product.op import normalised_product as normalised_product
from sparse_ffn.ops.wide_product.op import wide_product as wide_product
from sparse_ffn.ops.wide_product.reference import normalise as normalise
