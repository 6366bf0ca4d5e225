from fla_dist.kernels.swiglu.op import swiglu_linear

__all__ = ["swiglu_linear"]
