from fla_dist.kernels.delta_rule.op import delta_rule

__all__ = ["delta_rule"]
