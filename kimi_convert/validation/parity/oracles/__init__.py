"""Independent implementations, each in a process of its own: nothing else imports their libraries.

This is the one place of the package that knows transformers and mlx (ADR 17). A module here is run
by `python -m`, reads a request and writes a trace.
"""
