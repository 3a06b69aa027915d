"""Real data and tokenizers from outside of the project, for tests that skip where they are missing.

They lie in the folder `shared` beside the checkout, or where DSKD_SHARED says.
"""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def outside(name: str) -> Path:
    """A file or folder there; skips the test where it is missing."""
    found = Path(os.environ.get("DSKD_SHARED", ROOT.parent / "shared")) / name
    if not found.exists():
        pytest.skip(f"{found} is not there")
    return found
