"""Evaluation of label efficiency: linear probe, few labels, fine-tuning, statistics."""
