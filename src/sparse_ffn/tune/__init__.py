"""``python -m sparse_ffn.tune``: measures block sizes and crossovers on this machine; nothing runs unless called."""
