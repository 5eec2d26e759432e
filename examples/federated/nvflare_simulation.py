"""A federation in NVFLARE's simulator, a process for each hospital.

Arguments: a folder with plan.json and the MEDS folders site-1, site-2 ..., and one for output.
"""

import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from consortium import Plan
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from nvflare_controller import Consortium

HERE = Path(__file__).parent

data, output = (Path(folder).resolve() for folder in sys.argv[1:])
plan = Plan.read(data / "plan.json")
job = FedJob("clinattn", min_clients=plan.hospitals)
job.to_server(Consortium(asdict(plan), str(output)))
arguments = shlex.join([str(data), str(output)])
script = str(HERE / "nvflare_client.py")
raw = FrameworkType.RAW  # numpy arrays on both sides
job.to_clients(ScriptRunner(script, arguments, framework=raw), tasks=["*"])
for module in ("consortium.py", "hospital.py"):
    job.to_clients(str(HERE / module))
sys.exit(job.simulator_run(str(output / "nvflare"), plan.hospitals, log_config="concise"))
