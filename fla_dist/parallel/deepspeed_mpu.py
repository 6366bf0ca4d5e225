"""What DeepSpeed is told of the mesh.

DeepSpeed takes an object with `initialize_sequence_parallel` for one that divides sequences, and
then averages gradients over all ranks at ZeRO 0-2. It must not find `get_data_parallel_group`: with
one, the weights of sequence-parallel ranks drift apart without a word (seen with 0.19.8;
docs/notebook.md).
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fla_dist.parallel.mesh import Mesh


class DeepSpeedMPU:
    """The `mpu` argument of `deepspeed.initialize` for a mesh. All methods are named by
    DeepSpeed."""

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def initialize_sequence_parallel(self) -> None:
        """The mark that DeepSpeed looks for; the groups are made already."""

    def get_sequence_parallel_group(self) -> ProcessGroup | None:
        return self._mesh.sequence_group

    def get_sequence_parallel_world_size(self) -> int:
        return self._mesh.sequence_parallel_size

    def get_sequence_parallel_rank(self) -> int:
        return self._mesh.sequence_parallel_rank

    def get_sequence_data_parallel_group(self) -> ProcessGroup | None:
        return dist.group.WORLD

    def get_sequence_data_parallel_world_size(self) -> int:
        return self._mesh.world_size

    def get_sequence_data_parallel_rank(self) -> int:
        return self._mesh.rank

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.data_parallel_size

    def get_data_parallel_rank(self) -> int:
        return self._mesh.data_parallel_rank

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._mesh.solo_group

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_tensor_model_parallel_world_size(self) -> int:
        """Asked for when a universal checkpoint is loaded."""
        return 1

    def get_tensor_model_parallel_rank(self) -> int:
        return 0
