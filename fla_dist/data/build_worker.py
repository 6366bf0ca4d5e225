"""A builder process: units on its input, one line of result for each on its output.

Started as `python -m fla_dist.data.build_worker` rather than by `multiprocessing`, whose spawn
would import the training script, and with it torch and DeepSpeed, in every builder. It ends with
its input, so also when its parent is killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

from fla_dist.data.cache import TokenCache
from fla_dist.data.errors import DataError
from fla_dist.data.tokenizer import open_tokenizer
from fla_dist.data.units import Unit


def main() -> None:
    results = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints is no result
    os.nice(5)  # training that can run goes first
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # meant for training, which may still need this
    directory, tokenizer_path, on_bad_source = sys.argv[1:]
    tokenizer = open_tokenizer(Path(tokenizer_path))
    cache = TokenCache(Path(directory), tokenizer.sha256, on_bad_source)
    for line in sys.stdin:
        unit = Unit.from_json(json.loads(line))
        try:
            cache.build(unit, tokenizer)
            error = None
        except DataError as failure:
            error = str(failure)
        except MemoryError:
            error = f"{unit.key}: {unit.pieces[0].path}: not enough memory to encode it"
        try:
            print(json.dumps(error), file=results, flush=True)
        except BrokenPipeError:  # the parent was killed
            os._exit(0)


if __name__ == "__main__":
    main()
