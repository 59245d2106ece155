"""What surrounds a stage: inputs, publishing, provenance, tracking."""
