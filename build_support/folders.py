"""The folders of the repository and of its C++ sources."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CSRC = ROOT / "csrc"
LIBRARY = "libclinattn.so"  # in clinattn/, as clinattn/_C.py loads it
