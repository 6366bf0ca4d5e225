from fla_dist.kernels.rwkv7.op import rwkv7

__all__ = ["rwkv7"]
