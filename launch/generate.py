"""Continues a text from a checkpoint: `python launch/generate.py --checkpoint DIR --prompt "def "`.

DIR is a checkpoint, or a directory of them, of which the newest is taken. The model runs in its
recurrent form, so memory does not grow with the text, but for full attention's cache.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from fla_dist.config import ConfigError, config_from_dict
from fla_dist.data.tokenizer import open_tokenizer
from fla_dist.models import LanguageModel
from fla_dist.models.initialization import Uninitialized
from fla_dist.training.checkpoint import TOKENIZER, find_checkpoint, load_weights
from fla_dist.training.distributed import RunError


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.8, help="0: the likeliest token")
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    path = find_checkpoint(arguments.checkpoint)
    weights, tree = load_weights(path)
    config = config_from_dict(tree)
    tokenizer = open_tokenizer(path / TOKENIZER)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Uninitialized():
        model = LanguageModel(config.model)
    model.load_state_dict(weights)
    model.to(device)
    prompt = tokenizer.encode(arguments.prompt)
    if not prompt:
        parser.error("--prompt is empty")
    tokens = model.generate(
        torch.tensor([prompt], device=device),
        arguments.max_new_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        generator=torch.Generator(device).manual_seed(arguments.seed),
    )
    print(f"{path}:\n{tokenizer.decode(tokens[0].tolist())}")


if __name__ == "__main__":
    try:
        main()
    except (ConfigError, RunError) as error:
        sys.exit(f"error: {error}")
