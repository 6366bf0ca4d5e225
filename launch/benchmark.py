"""Benchmarks of the ops, and what their kernels take before they run.

python launch/benchmark.py ops [--ops gla retention] [--shapes 2] [--output
docs/benchmarks/ops_h200.json] python launch/benchmark.py compile-check [--thorough]
python launch/benchmark.py tune [--ops gla] [--shapes 1]
python launch/benchmark.py data [--output docs/benchmarks/data_<machine>.json]
python launch/benchmark.py step --config configs/samba_32k.json [--section.key value ...]
torchrun --nproc-per-node 8 launch/benchmark.py links
python launch/benchmark.py scaling --config configs/samba_32k.json --sizes 1 2 4
[--section.key value ...]
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    from fla_dist.benchmark import data as data_pipeline
    from fla_dist.benchmark import links, scaling, step

    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="time the ops on this machine's GPU")
    ops.add_argument("--ops", nargs="+", default=None, help="default: all")
    ops.add_argument("--shapes", type=int, default=None, help="only the first so many shapes")
    ops.add_argument("--output", default=None, help="default: docs/benchmarks/ops_<gpu>.json")
    tune = commands.add_parser("tune", help="find launch settings, and write their tables")
    tune.add_argument("--ops", nargs="+", default=None, help="default: all that have a table")
    tune.add_argument("--shapes", type=int, default=1, help="only the first so many shapes")
    check = commands.add_parser(
        "compile-check", help="compile every kernel ahead of time, without a GPU"
    )
    check.add_argument(
        "--thorough", action="store_true", help="more head sizes, dtypes and decays (minutes)"
    )
    data_pipeline.add_arguments(commands.add_parser("data", help="time the data pipeline"))
    step.add_arguments(
        commands.add_parser("step", help="time training steps of a config", allow_abbrev=False)
    )
    links.add_arguments(commands.add_parser("links", help="time collectives between ranks"))
    scaling.add_arguments(
        commands.add_parser("scaling", help="train on more and more ranks", allow_abbrev=False)
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.command == "step":
        return step.run(arguments, overrides)
    if arguments.command == "scaling":
        return scaling.run(arguments, overrides)
    if overrides:
        parser.error(f"unrecognized arguments: {' '.join(overrides)}")
    if arguments.command == "links":
        return links.run(arguments)
    if arguments.command == "data":
        return data_pipeline.run(arguments)
    if arguments.command == "compile-check":
        from fla_dist.benchmark.compile_cases import check_all

        return 0 if check_all(thorough=arguments.thorough) else 1

    import torch

    if not torch.cuda.is_available():
        parser.error(f"{arguments.command} needs a GPU, and this machine has none")
    from fla_dist.benchmark.op_times import benchmark
    from fla_dist.benchmark.ops import OPS, SHAPES

    if arguments.command == "tune":
        from fla_dist.benchmark.tune import FAMILIES
        from fla_dist.benchmark.tune import tune as tune_op

        for shape in SHAPES[: arguments.shapes]:
            for name in arguments.ops or FAMILIES:
                tune_op(name, shape)
        return 0

    gpu = torch.cuda.get_device_name().replace("NVIDIA ", "").split()[0].lower()
    path = arguments.output or f"docs/benchmarks/ops_{gpu}.json"
    command = " ".join(["python", *sys.argv])
    right = benchmark(arguments.ops or list(OPS), arguments.shapes or len(SHAPES), path, command)
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
