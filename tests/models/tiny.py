"""Small models for tests, one for each layer pattern of the test matrix."""

from __future__ import annotations

from fla_dist.config import ModelConfig

MIXERS = {
    "mamba": {"state_size": 4},
    "sliding_window_attention": {"num_heads": 2, "num_kv_heads": 2, "window_size": 15},
    "gla": {"num_heads": 2, "gate_rank": 4},
    "attention": {"num_heads": 4, "num_kv_heads": 2},
    "retention": {"num_heads": 2, "expand_v": 1.5},
    "linear_attention": {"num_heads": 2},
    "delta_net": {"num_heads": 2},
    "gated_delta_net": {
        "num_heads": 1,
        "num_value_heads": 2,
        "head_size": 6,
        "expand_v": 1.5,
        "allow_negative_eigenvalues": True,
    },
    "kda": {"num_heads": 2, "head_size": 6},
    "rwkv7": {
        "head_size": 8,
        "decay_rank": 3,
        "learning_rate_rank": 3,
        "value_rank": 3,
        "gate_rank": 3,
    },
    "gsa": {"num_heads": 2, "num_slots": 3},
    "hgrn": {},
    "hgrn2": {"expansion": 4},
    "mamba2": {"state_size": 5, "head_size": 8, "num_groups": 2},
    "rwkv6": {"head_size": 4, "shift_rank": 3, "decay_rank": 3},
}
"""The window is longer than a slice of 12 tokens and shorter than one of 24."""

PATTERNS = {
    "samba": ("mamba", "sliding_window_attention"),
    "gla": ("gla",),
    "attention": ("attention",),
    "retention": ("retention", "linear_attention"),
    "delta": ("delta_net", "gated_delta_net", "kda"),
    "rwkv7": ("rwkv7",),
    "mamba2": ("mamba2",),
    "hgrn": ("hgrn", "hgrn2"),
    "rwkv6": ("rwkv6", "gsa"),
    "all": tuple(MIXERS),
}


def tiny_config(pattern: str, **changes) -> ModelConfig:
    return ModelConfig(
        **{
            "layer_pattern": PATTERNS[pattern],
            "num_hidden_layers": max(2, len(PATTERNS[pattern])),
            "hidden_size": 16,
            "intermediate_size": 24,
            "vocab_size": 37,
            "mixers": {name: MIXERS[name] for name in PATTERNS[pattern]},
            **changes,
        }
    )
