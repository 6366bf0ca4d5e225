from fla_dist.kernels.short_convolution.op import short_convolution

__all__ = ["short_convolution"]
