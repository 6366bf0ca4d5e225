from fla_dist.kernels.gsa.op import gsa

__all__ = ["gsa"]
