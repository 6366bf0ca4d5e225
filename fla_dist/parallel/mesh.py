"""The ranks as a grid (data, sequence), and every process group, made once.

    rank = data_parallel_rank · sequence_parallel_size + sequence_parallel_rank

so that the ranks that divide one sequence are neighbours, and share a host where one holds them
all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist
from torch.distributed import ProcessGroup

StateExchange = Literal["all_gather", "hierarchical"]
AttentionExchange = Literal["all_gather", "all_to_all", "ring"]


@dataclass(frozen=True)
class Mesh:
    """Where this rank stands.

    Attributes:
        ranks_per_host: ranks of every host, one after the other.
        sequence_group: the ranks that hold the slices of the same sequences, in their order; None
            where there is one.
        data_group: the ranks that hold the same slice of different sequences; None where there is
            one.
        solo_group: this rank alone; None without torch.distributed.
        host_group: the ranks of the sequence on this host; None where one host holds all of them,
            or hosts cut the sequence unevenly.
        cross_group: the ranks of the sequence that have this one's place on their own host; None
            with host_group.
        state_exchange: how recurrent states cross ranks (state_scan.py).
        attention_exchange: how full attention does (attention.py); None: chosen for each layer.
    """

    rank: int = 0
    world_size: int = 1
    sequence_parallel_size: int = 1
    ranks_per_host: int = 1
    sequence_group: ProcessGroup | None = None
    data_group: ProcessGroup | None = None
    solo_group: ProcessGroup | None = None
    host_group: ProcessGroup | None = None
    cross_group: ProcessGroup | None = None
    state_exchange: StateExchange = "all_gather"
    attention_exchange: AttentionExchange | None = None

    @property
    def sequence_parallel_rank(self) -> int:
        return self.rank % self.sequence_parallel_size

    @property
    def data_parallel_rank(self) -> int:
        return self.rank // self.sequence_parallel_size

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // self.sequence_parallel_size

    @property
    def first_sequence_rank(self) -> int:
        """The world's rank of the sequence's first slice."""
        return self.rank - self.sequence_parallel_rank

    @property
    def spans_hosts(self) -> bool:
        return spans_hosts(self.sequence_parallel_size, self.ranks_per_host)


def spans_hosts(sequence_parallel_size: int, ranks_per_host: int) -> bool:
    """Whether some sequence is divided over more than one host."""
    return ranks_per_host % sequence_parallel_size != 0


def ranks_of_a_host(sequence_parallel_size: int, ranks_per_host: int) -> int | None:
    """How many ranks of a sequence each of its hosts holds, where it has several hosts of several
    ranks each and they hold the same number; None elsewhere."""
    divided = sequence_parallel_size > ranks_per_host > 1
    return ranks_per_host if divided and sequence_parallel_size % ranks_per_host == 0 else None


def build_mesh(
    sequence_parallel_size: int = 1,
    *,
    ranks_per_host: int | None = None,
    state_exchange: Literal["auto"] | StateExchange = "auto",
    attention_exchange: Literal["auto"] | AttentionExchange = "auto",
) -> Mesh:
    """Makes the grid and its groups; collective over all ranks where torch.distributed is
    initialized.

    Args:
        ranks_per_host: what the launcher says where left out (LOCAL_WORLD_SIZE of torchrun,
            LOCAL_SIZE of deepspeed), and else the whole world.
        state_exchange: `auto` takes the hierarchical one where sequences span hosts.

    Raises:
        ValueError: the world is not a multiple of `sequence_parallel_size`, or the exchange that
            was asked for does not fit the hosts.
    """
    initialized = dist.is_available() and dist.is_initialized()
    world_size = dist.get_world_size() if initialized else 1
    if sequence_parallel_size < 1 or world_size % sequence_parallel_size:
        raise ValueError(
            f"parallelism.sequence_parallel_size is {sequence_parallel_size}, "
            f"expected a divisor of the {world_size} rank(s) that were started"
        )
    if ranks_per_host is None:
        told = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
        ranks_per_host = int(told) if told else world_size
    chosen = choose_state_exchange(state_exchange, sequence_parallel_size, ranks_per_host)
    if not initialized:
        return Mesh()
    ranks = range(world_size)
    size = sequence_parallel_size
    sequences = [list(ranks[first : first + size]) for first in ranks[::size]]
    host_group = cross_group = None
    if local := ranks_of_a_host(size, ranks_per_host):
        host_group = _own_group(
            [s[i : i + local] for s in sequences for i in range(0, size, local)]
        )
        cross_group = _own_group([s[i::local] for s in sequences for i in range(local)])
    return Mesh(
        rank=dist.get_rank(),
        world_size=world_size,
        sequence_parallel_size=size,
        ranks_per_host=ranks_per_host,
        sequence_group=_own_group(sequences),
        data_group=_own_group([list(ranks[offset::size]) for offset in range(size)]),
        solo_group=_own_group([[rank] for rank in ranks]),
        host_group=host_group,
        cross_group=cross_group,
        state_exchange=chosen,
        attention_exchange=None if attention_exchange == "auto" else attention_exchange,
    )


def choose_state_exchange(
    wanted: Literal["auto"] | StateExchange, sequence_parallel_size: int, ranks_per_host: int
) -> StateExchange:
    """The exchange to use; a ValueError where the hosts do not allow the one wanted."""
    possible = ranks_of_a_host(sequence_parallel_size, ranks_per_host) is not None
    if wanted == "hierarchical" and not possible:
        raise ValueError(
            f"parallelism.state_exchange is 'hierarchical', expected sequences over several whole "
            f"hosts of two or more ranks; sequence_parallel_size is {sequence_parallel_size} with "
            f"{ranks_per_host} rank(s) a host"
        )
    if wanted == "auto":
        return "hierarchical" if possible else "all_gather"
    return wanted


def _own_group(partition: list[list[int]]) -> ProcessGroup:
    """Every rank takes part in making every group; each keeps its own."""
    group, _ = dist.new_subgroups_by_enumeration(partition)
    return group
