"""Data sources: what people have their images in. A module per layout, and one that opens and joins them."""
