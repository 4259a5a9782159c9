"""Where results are written: `results/<device>.json`."""

from pathlib import Path

RESULTS = Path(__file__).parent / "results"
