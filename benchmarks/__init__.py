"""Benchmarks: the layers and their cores against dense networks and other libraries, checked before they are timed."""
