"""What a measurement was made with."""

from __future__ import annotations

import datetime
import importlib.util
import subprocess
from typing import Any

import torch
import triton


def environment(command: str) -> dict[str, Any]:
    def output(*arguments: str) -> str:
        try:
            return subprocess.run(
                arguments, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    driver = output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").split("\n")
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "driver": driver[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": output("git", "rev-parse", "HEAD"),
        "command": command,
        "date": datetime.date.today().isoformat(),
        "peers": "flash-linear-attention" if importlib.util.find_spec("fla") else "none installed",
    }
