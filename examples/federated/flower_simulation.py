"""A federation in Flower's simulator, on one core.

Arguments: a folder with plan.json and the MEDS folders site-1, site-2 ..., and one for output.
"""

import os
import sys
from pathlib import Path

data, output = (str(Path(folder).resolve()) for folder in sys.argv[1:])
os.environ |= {"FEDERATION_DATA": data, "FEDERATION_OUTPUT": output}
# both packages report their use to their makers unless told otherwise
os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_USAGE_STATS_ENABLED": "0"}

from consortium import Plan  # noqa: E402
from flower_client import client  # noqa: E402
from flower_server import server  # noqa: E402
from flwr.simulation import run_simulation  # noqa: E402

plan = Plan.read(Path(data, "plan.json"))
cores = {"client_resources": {"num_cpus": 1}}
cores["init_args"] = {"num_cpus": 1, "include_dashboard": False}
run_simulation(server, client, plan.hospitals, backend_config=cores)
