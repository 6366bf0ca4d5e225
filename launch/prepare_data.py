"""Builds, checks and shows a run's token cache ahead of training, from the run's own config.

    python launch/prepare_data.py build   --config configs/samba_tiny.json
    python launch/prepare_data.py verify  --config configs/samba_tiny.json
    python launch/prepare_data.py inspect --config configs/samba_tiny.json [--section.key value ...]
    python launch/prepare_data.py train-tokenizer --config configs/samba_tiny.json

`build` trains the tokenizer if the config asks for one, and encodes every unit. `verify` reads
every byte of the cache and removes what is damaged, for `build` or training to make again.
`inspect` shows the sources, the lengths of their documents, the blend, and the first sequence.
`train-tokenizer` trains the tokenizer alone and says where it is. Several hosts may run `build`
over one cache at once; they share the work.
Exit codes: 0 good, 1 damage found, 2 refused (config, data).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from fla_dist.config import ConfigError, load_config
from fla_dist.data import DataError, load_tokenizer
from fla_dist.data.errors import DamagedShardError
from fla_dist.data.inspection import build, describe, quarantined, summarize, verify
from fla_dist.data.plan import Plan, Split

EXIT_DAMAGED, EXIT_REFUSED = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=("build", "verify", "inspect", "train-tokenizer"))
    parser.add_argument("--config", required=True, help="the run's JSON file")
    parsed, overrides = parser.parse_known_args(arguments)
    config = load_config(parsed.config, overrides)
    tokenizer = load_tokenizer(config.tokenizer, config.data)
    tokenizer.require_vocabulary(config.model.vocab_size)

    if parsed.command == "train-tokenizer":
        if config.tokenizer.train is None:
            raise ConfigError("tokenizer.train: the config names a tokenizer and trains none")
        print(f"{tokenizer.path}: {tokenizer.vocab_size} tokens")
        return 0

    splits: tuple[Split, ...] = ("train", "validation")
    problems = []
    for split in splits if config.data.validation_sources else splits[:1]:
        plan = Plan.make(config.data, tokenizer, split)
        if parsed.command == "build":
            build(plan, config.data.num_workers)
            print(summarize(plan))
            for reason in quarantined(plan):
                print(f"quarantined: {reason}", file=sys.stderr)
        elif parsed.command == "verify":
            found = verify(plan)
            if not found:
                print(f"{summarize(plan)}: all whole")
            problems += found
        else:
            for line in describe(plan, config.data, split):
                print(line)
            print()
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    return EXIT_DAMAGED if problems else 0


def run() -> None:
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, `head` perhaps, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes at its end
        code = 0
    except (ConfigError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        code = EXIT_REFUSED
    except DamagedShardError as error:
        print(f"error: {error}; run build first, or verify", file=sys.stderr)
        code = EXIT_DAMAGED
    sys.exit(code)


if __name__ == "__main__":
    run()
