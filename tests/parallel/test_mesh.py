from __future__ import annotations

import pytest
import torch.distributed as dist

from fla_dist.parallel.deepspeed_mpu import DeepSpeedMPU
from fla_dist.parallel.mesh import Mesh, build_mesh
from tests.parallel.ranks import run_ranks


def describe() -> dict:
    mesh = build_mesh(2)
    mpu = DeepSpeedMPU(mesh)
    try:
        build_mesh(3)
        refusal = ""
    except ValueError as error:
        refusal = str(error)
    return {
        "place": (mesh.data_parallel_rank, mesh.sequence_parallel_rank),
        "sequence": dist.get_process_group_ranks(mesh.sequence_group),
        "data": dist.get_process_group_ranks(mesh.data_group),
        "solo": dist.get_process_group_ranks(mesh.solo_group),
        "deepspeed": dist.get_process_group_ranks(mpu.get_sequence_data_parallel_group()),
        "refusal": refusal,
    }


def test_neighbours_share_a_sequence() -> None:
    expected_sequence = [[0, 1], [0, 1], [2, 3], [2, 3]]
    expected_data = [[0, 2], [1, 3], [0, 2], [1, 3]]
    for rank, got in enumerate(run_ranks(4, describe)):
        assert got["place"] == (rank // 2, rank % 2)
        assert got["sequence"] == expected_sequence[rank]
        assert got["data"] == expected_data[rank]
        assert got["solo"] == [rank]
        assert got["deepspeed"] == [0, 1, 2, 3]
        assert "sequence_parallel_size is 3, expected a divisor of the 4 rank(s)" in got["refusal"]


def groups_of_hosts() -> tuple[list[int], list[int], str]:
    mesh = build_mesh(4, ranks_per_host=2)
    assert mesh.spans_hosts
    return (
        dist.get_process_group_ranks(mesh.host_group),
        dist.get_process_group_ranks(mesh.cross_group),
        mesh.state_exchange,
    )


def test_hosts_divide_the_ranks_of_a_sequence() -> None:
    for rank, (host, cross, exchange) in enumerate(run_ranks(8, groups_of_hosts)):
        first = rank // 4 * 4
        assert host == ([first, first + 1] if rank % 4 < 2 else [first + 2, first + 3])
        assert cross == [first + rank % 2, first + rank % 2 + 2]
        assert exchange == "hierarchical"


def test_one_process_needs_no_process_group() -> None:
    assert build_mesh(1) == Mesh()
    with pytest.raises(ValueError, match="sequence_parallel_size is 2"):
        build_mesh(2)


def test_deepspeed_finds_no_data_parallel_group() -> None:
    """With one it would reduce gradients over the data ranks only."""
    assert not hasattr(DeepSpeedMPU(Mesh()), "get_data_parallel_group")
    assert DeepSpeedMPU(Mesh()).get_data_parallel_world_size() == 1
