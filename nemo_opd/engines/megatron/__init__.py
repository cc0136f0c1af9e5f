"""Student and teacher on Megatron-core: with Transformer Engine and NCCL where there is CUDA, over gloo where not."""

import warnings

# Megatron says at import, several times per process, that Transformer Engine and Apex are absent; `model.py` decides by
# itself which of its layers to use. Its collectives call functions that torch is about to rename.
warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
warnings.filterwarnings("ignore", message=r".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated")
