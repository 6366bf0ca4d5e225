from fla_dist.kernels.mamba.op import selective_scan

__all__ = ["selective_scan"]
