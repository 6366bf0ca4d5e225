"""`python -m tests.training.forked 2 script arguments...`: a script's ranks, as of torchrun.

They are forks of one process that has imported what they need, most of the time of a short run. No
rank is ended by the end of another.
"""

from __future__ import annotations

import os
import runpy
import sys


def main() -> int:
    from tests.training.launching import free_port

    ranks, script, *arguments = sys.argv[1:]
    sys.argv = [script, *arguments]
    os.environ.update(WORLD_SIZE=ranks, LOCAL_WORLD_SIZE=ranks, MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(free_port())
    import deepspeed  # noqa: F401

    import fla_dist.training.trainer  # noqa: F401

    processes = []
    for rank in range(int(ranks)):
        process = os.fork()
        if process == 0:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
            runpy.run_path(script, run_name="__main__")
            return 0
        processes.append(process)
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(p, 0)[1])) for p in processes)


if __name__ == "__main__":
    sys.exit(main())
