"""Tasks that small models can learn, made from a seed, so that every stage can be tried without a download."""
