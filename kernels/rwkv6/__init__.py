from fla_dist.kernels.rwkv6.op import rwkv6

__all__ = ["rwkv6"]
