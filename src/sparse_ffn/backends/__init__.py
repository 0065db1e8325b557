"""The backends: which one computes, and what the compiled ones are called through."""
