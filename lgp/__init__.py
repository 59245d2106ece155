"""Layer Grafted Pre-training (Jiang et al., ICLR 2023, arXiv 2302.14138)."""

__version__ = "0.1.0"
