"""The same tokens through every implementation of a model, and where two of them part."""
