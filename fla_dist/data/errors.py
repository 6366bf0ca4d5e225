"""What can be wrong with data."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names the config key, or the file and line or row."""


class DamagedShardError(Exception):
    """A shard whose bytes are not those that were written; it is rebuilt from its source."""
