"""What a conversion learns from text: statistics of the teacher, and weights fitted to it.

Start with `run.py`, which goes through the layers. Everything is solved, searched or averaged in
closed form but for `align.py`, which takes gradient steps where a recipe asks for them.
"""
