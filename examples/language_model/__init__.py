"""A byte-level language model trained with each feed-forward layer: python -m examples.language_model --help."""
