"""The place of torch's headers, also for a build that pip isolates from the environment."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

# -E: the variables by which pip isolates a build are not read. Ends with status 1 without torch.
ASK = """
import sys
from importlib.util import find_spec
sys.exit(1) if find_spec("torch") is None else print(*sys.path, sep="\\n")
"""


def torch_folder() -> Path | None:
    """Returns the folder of the package torch, which is not imported; None where there is none.

    An isolated build does not see the environment that pip was called in. Its torch serves all the
    same: what is compiled uses the stable ABI, and runs under every later torch. That environment
    is then put at the end of sys.path.
    """
    if find_spec("torch") is None:
        sys.path.extend(x for x in outer_path() if x not in sys.path)
    found = find_spec("torch")
    folders = [] if found is None else list(found.submodule_search_locations or [])
    return Path(folders[0]) if folders else None


def outer_path() -> list[str]:
    """The sys.path of this Python outside of the isolation; [] where it has no torch either."""
    command = [sys.executable, "-E", "-c", ASK]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    return [x for x in done.stdout.splitlines() if x] if done.returncode == 0 else []
