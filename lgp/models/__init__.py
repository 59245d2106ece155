"""The encoder, the models that pre-train it, and the folders that store it."""
