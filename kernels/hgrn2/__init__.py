from fla_dist.kernels.hgrn2.op import hgrn2

__all__ = ["hgrn2"]
