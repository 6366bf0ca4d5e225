"""--dry-run: arithmetic that can be checked by hand."""

from __future__ import annotations

import pytest

from fla_dist.config import ConfigError, load_config
from fla_dist.training.dry_run import describe_run

SAMBA_32K = "configs/samba_32k.json"


def test_samba_1_3b_has_the_published_size() -> None:
    text = describe_run(load_config(SAMBA_32K), 8)
    lines = dict(line.rsplit("  ", 1) for line in text.splitlines())
    lines = {name.strip(): value for name, value in lines.items()}
    assert lines["parameters"] == "1,330,207,488"
    assert lines["gradient accumulation steps"] == "32"
    assert lines["tokens a rank and micro batch"] == "1 x 8,192"
    assert lines["tokens a step"] == "2,097,152"


def test_a_world_that_cannot_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match="sequence_parallel_size: 4 does not divide"):
        describe_run(load_config(SAMBA_32K), 6)
