from fla_dist.kernels.attention.mask import AttentionMask, attention_mask
from fla_dist.kernels.attention.op import attention

__all__ = ["AttentionMask", "attention", "attention_mask"]
