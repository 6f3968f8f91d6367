import sys
from pathlib import Path

# The benchmarks are scripts, whose own folder is where they import each other from.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
