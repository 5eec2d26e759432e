"""A hospital's client of Flower: answers the messages of flower_server.py.

Its folders are `data` and `output` of the node's configuration, or, in a simulation, a folder of
the hospital's name in those that FEDERATION_DATA and FEDERATION_OUTPUT name.
"""

import json
import os

from consortium import Plan
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hospital import Hospital, opened

client = ClientApp()


def hospital(message: Message, context: Context) -> tuple[str, Hospital]:
    """Returns the name and the hospital, which has joined where the message has tokens."""
    own, agreed = context.node_config, message.content["config"]
    name = own.get("name") or f"site-{own['partition-id'] + 1}"
    data, output = (
        own.get(kind) or os.path.join(os.environ[f"FEDERATION_{kind.upper()}"], name)
        for kind in ("data", "output")
    )
    found = opened(data, Plan(**json.loads(agreed["plan"])), output)
    return name, found.join(agreed["tokens"]) if "tokens" in agreed else found


def reply(message: Message, name: str, metrics: dict, **records: ArrayRecord) -> Message:
    content = {"metrics": MetricRecord(metrics), "who": ConfigRecord({"name": name})}
    return Message(RecordDict(content | records), reply_to=message)


def weights(message: Message) -> dict:
    return {name: array.numpy() for name, array in message.content["arrays"].items()}


@client.query()
def counts(message: Message, context: Context) -> Message:
    name, own = hospital(message, context)
    return reply(message, name, own.counts())


@client.train()
def train(message: Message, context: Context) -> Message:
    name, own = hospital(message, context)
    number = message.content["config"]["server-round"] - 1
    trained = own.train(number, weights(message))
    arrays = ArrayRecord({key: Array(x) for key, x in trained.weights.items()})
    metrics = {"tokens": trained.tokens, "epsilon": trained.epsilon}
    return reply(message, name, metrics, arrays=arrays)


@client.evaluate()
def finish(message: Message, context: Context) -> Message:
    name, own = hospital(message, context)
    return reply(message, name, {"auprc": own.finish(weights(message))})
