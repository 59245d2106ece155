"""The label-efficiency protocol on frozen features."""
