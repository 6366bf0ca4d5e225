from fla_dist.kernels.retention.op import linear_attention, retention, retention_decay

__all__ = ["linear_attention", "retention", "retention_decay"]
