from fla_dist.kernels.simple_gla.op import simple_gla

__all__ = ["simple_gla"]
