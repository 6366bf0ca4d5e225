from fla_dist.kernels.mamba2.op import state_space_dual

__all__ = ["state_space_dual"]
