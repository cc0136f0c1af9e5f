"""On-policy distillation of large language models on Megatron-core."""

__version__ = "0.1.0"
