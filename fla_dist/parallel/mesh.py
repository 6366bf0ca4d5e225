"""The ranks as a grid (data, sequence), and every process group, made once.

    rank = data_parallel_rank · sequence_parallel_size + sequence_parallel_rank

so that the ranks that divide one sequence are neighbours, and share a host where one holds them
all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Attributes:
        sequence_group: the ranks that hold the slices of the same sequences, in their order; None
            where there is one.
        data_group: the ranks that hold the same slice of different sequences; None where there is
            one.
        solo_group: this rank alone; None without torch.distributed.
    """

    rank: int = 0
    world_size: int = 1
    sequence_parallel_size: int = 1
    sequence_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    solo_group: ProcessGroup | None = None

    @property
    def sequence_parallel_rank(self) -> int:
        return self.rank % self.sequence_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        return self.rank // self.sequence_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.sequence_parallel_size


def build_mesh(sequence_parallel_size: int = 1) -> Mesh:
    """Makes the grid and its groups; collective over all ranks where torch.distributed is
    initialized.

    Raises:
        ValueError: the world is not a multiple of `sequence_parallel_size`.
    """
    initialized = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if initialized else 1
    if sequence_parallel_size < 1 or world_size % sequence_parallel_size:
        raise ValueError(
            f"parallelism.sequence_parallel_size is {sequence_parallel_size}, "
            f"expected a divisor of the {world_size} rank(s) that were started"
        )
    if not initialized:
        return Mesh()
    ranks = range(world_size)
    size = sequence_parallel_size
    return Mesh(
        rank=dist.get_rank(),
        world_size=world_size,
        sequence_parallel_size=size,
        sequence_group=_own_group([list(ranks[first : first + size]) for first in ranks[::size]]),
        data_group=_own_group([list(ranks[offset::size]) for offset in range(size)]),
        solo_group=_own_group([[rank] for rank in ranks]),
    )


def _own_group(partition: list[list[int]]) -> ProcessGroup:
    """Every rank takes part in making every group; each keeps its own."""
    group, _ = dist.new_subgroups_by_enumeration(partition)
    return group
