from fla_dist.kernels.attention.op import attention

__all__ = ["attention"]
