import sys
from pathlib import Path

# The benchmarks are scripts and import each other from their own folder.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
