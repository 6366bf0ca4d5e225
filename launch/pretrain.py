"""Pretrains a model: `deepspeed launch/pretrain.py --config configs/samba_tiny.json`.

The same under torchrun, or under plain python for one process. Any key of the config can follow on
the command line: `--optimizer.lr 2e-4`. Exit codes: 0 finished, 75 stopped by a signal after
saving, 2 refused (config, data, checkpoint), 1 anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback

from fla_dist.config import ConfigError, config_to_dict, load_config

EXIT_FAILED, EXIT_REFUSED = 1, 2


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, help="the run's JSON file")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config")
    parser.add_argument("--dry-run", action="store_true", help="print batch and model arithmetic")
    parser.add_argument("--world-size", type=int, default=1, help="number of ranks for --dry-run")
    parser.add_argument("--ranks-per-host", type=int, default=8, help="their hosts for --dry-run")
    parser.add_argument(
        "--links", help="what `launch/benchmark.py links` measured, for --dry-run's exchange"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments, overrides = parser.parse_known_args()
    config = load_config(arguments.config, overrides)
    if arguments.print_config:
        print(json.dumps(config_to_dict(config), indent=2))
    if arguments.dry_run:
        from fla_dist.parallel.cost import Links, read_links
        from fla_dist.training.dry_run import describe_run

        try:
            links = read_links(arguments.links) if arguments.links else Links()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        hosts = arguments.ranks_per_host
        print(describe_run(config, arguments.world_size, ranks_per_host=hosts, links=links))
    if arguments.print_config or arguments.dry_run:
        return 0

    from fla_dist.training.trainer import pretrain

    return pretrain(config)


def run() -> None:
    """Turns what a user can get wrong into one line, printed by one rank, and an exit code."""
    from fla_dist.training.distributed import RunError

    try:
        code = main()
    except (ConfigError, RunError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        code = EXIT_REFUSED
    except Exception:
        rank = os.environ.get("RANK", "0")
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        # Without waiting for ranks that wait for this one; the launcher ends them.
        os._exit(EXIT_FAILED)
    sys.exit(code)


if __name__ == "__main__":
    run()
