from fla_dist.kernels.kda.op import kda

__all__ = ["kda"]
