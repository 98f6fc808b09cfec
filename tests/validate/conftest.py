"""Lets the validator's tests import `checkpoints` and the faults, which lie beside this file."""

import sys
from pathlib import Path

# pytest's importlib mode does not put the folder of a test on the path
sys.path.insert(0, str(Path(__file__).parent))
