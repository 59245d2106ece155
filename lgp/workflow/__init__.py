"""The frame of every stage: inputs, publishing, provenance, tracking."""
