"""What a recipe takes before any GPU is asked for: memory, messages and time of every distinct rank.

Arithmetic on a model's config.json, without torch. `engines/megatron/blueprint.py` builds the same ranks for real, on
the meta device, and the two must agree.
"""
