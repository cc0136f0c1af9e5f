"""Distributions over the vocabulary, whole or sharded over tensor-parallel ranks, and losses on them.

shard.py         which rows of an output layer a rank holds
collectives.py   the few collectives that are used, differentiable where needed, all of them counted
view.py          what a loss may ask of a distribution
logits.py        the answer from logits (whole vocabulary, or this rank's columns of it)
partial.py       the answer from the scores of a served teacher
fused.py         from hidden states to loss and gradients, a chunk of tokens at a time
"""
