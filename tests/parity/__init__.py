"""One model, many implementations: each claim against one oracle, and faults that must be found."""
