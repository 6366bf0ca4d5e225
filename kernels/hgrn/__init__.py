from fla_dist.kernels.hgrn.op import hgrn

__all__ = ["hgrn"]
