from fla_dist.kernels.mamba.op import projected_selective_scan, selective_scan

__all__ = ["projected_selective_scan", "selective_scan"]
