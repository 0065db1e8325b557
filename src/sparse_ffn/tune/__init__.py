"""``python -m sparse_ffn.tune``: measures block sizes on the card at hand. Nothing here runs unless it is called."""
