"""Finding the FFNs of a model by what modules compute."""
