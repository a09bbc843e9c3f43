"""Measurements of speed and memory: each module is a script, `python -m kimi_convert.bench.<name>`."""
