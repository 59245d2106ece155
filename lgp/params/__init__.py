"""The parameters: a module per group of sections of params.yaml, and `file`, which loads and checks them."""
