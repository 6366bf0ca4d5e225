from fla_dist.kernels.gla.op import gla

__all__ = ["gla"]
