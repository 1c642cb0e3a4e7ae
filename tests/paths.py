"""Where things lie."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
ROOT = Path(__file__).parents[1]
TINY = ROOT / "examples" / "tiny_pair"
