"""Where and how to compute: device, precision, processes, interruption, counted randomness."""
