from __future__ import annotations

import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "batch_embeddings.py"


def test_the_example_batches_names_the_bad_text_and_lets_the_hurried_caller_go() -> None:
    done = subprocess.run(
        [sys.executable, str(EXAMPLE)], capture_output=True, text=True, check=True, timeout=60
    )

    alone, batched, refused, hurried, counted = done.stdout.splitlines()
    assert alone.startswith("one call per text: 64 calls, ")
    assert batched.startswith("batched:           2 calls, ")
    assert refused == "10 of 11 embedded, refused: not a report: 'spam'"
    assert hurried == "a hurried caller left without its vector: True"
    assert counted == "rows answered: 74, failed: 1, taken back: 1"
