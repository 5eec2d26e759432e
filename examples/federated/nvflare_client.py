"""A hospital's client of NVFLARE: answers the tasks of nvflare_controller.py.

Arguments: folders for data and for output, that hold a folder of the hospital's name each.
"""

import sys
from pathlib import Path

import nvflare.client as flare
from consortium import Plan
from hospital import opened
from nvflare.app_common.abstract.fl_model import FLModel

flare.init()
data, output = (Path(folder) / flare.get_site_name() for folder in sys.argv[1:])
while flare.is_running():
    message = flare.receive()
    hospital = opened(data, Plan(**message.meta["plan"]), output)
    match flare.get_task_name():
        case "counts":
            reply = FLModel(params={}, meta={"counts": hospital.counts()})
        case "train":
            joined = hospital.join(message.meta["tokens"])
            weights, tokens, epsilon = joined.train(message.current_round, message.params)
            reply = FLModel(params=weights, meta={"tokens": tokens, "epsilon": epsilon})
        case "finish":
            joined = hospital.join(message.meta["tokens"])
            reply = FLModel(params={}, meta={"auprc": joined.finish(message.params)})
    flare.send(reply)
