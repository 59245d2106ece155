"""Computation: device, precision, processes, interruption, counted randomness."""
