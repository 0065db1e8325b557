"""Bridges to other libraries: checkpoints here; import by name a file that itself imports the library."""

from sparse_ffn.integrations.checkpoints import from_transformers as from_transformers
from sparse_ffn.integrations.checkpoints import to_transformers as to_transformers
from sparse_ffn.integrations.moe_layer import from_moe_layer as from_moe_layer
from sparse_ffn.integrations.moe_layer import to_moe_layer as to_moe_layer
from sparse_ffn.integrations.product_keys import from_product_key_memory as from_product_key_memory
from sparse_ffn.integrations.product_keys import from_xlm as from_xlm
