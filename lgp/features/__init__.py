"""Frozen features: extraction, cache, k-NN."""
