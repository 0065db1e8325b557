"""From the weights of a dense FFN to those of a layer."""
