"""Single-device reference models, readable against the papers, and the names of their tensors."""
