"""The encoder and the two objectives: masked autoencoder and momentum contrast."""
