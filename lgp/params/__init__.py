"""The parameters: a module per section of params.yaml, and the file that loads and checks them."""
