"""A checkpoint in the forms that other programs load."""
