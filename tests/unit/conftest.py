"""For the modules that tests of this folder share."""
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent))
