"""What the tests of conversions share."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.models import DTYPES, MODELS, make_model, model_name

from searchr1.checkpoints.hf2mg import MegatronOptions, hf2mg

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="session")
def saved_by_megatron(tmp_path_factory):
    """Folder with, for every model: `hf`, hf2mg's `stacked` and `separate`, and what Megatron itself saved."""
    root = tmp_path_factory.mktemp("megatron")
    for family, tied in MODELS:
        for dtype in ("fp32", "bf16"):
            folder = root / model_name(family, tied, dtype)
            make_model(family, tied, folder / "hf", seed=7, dtype=DTYPES[dtype])
            for layers in ("stacked", "separate"):
                hf2mg(folder / "hf", folder / layers, MegatronOptions(layers=layers, file_bytes=100_000))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(SUPPORT / "convert_ranks.py")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(port), str(root)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    outputs = [rank.communicate(timeout=280)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(text[-4000:] for text in outputs)
    return root
