"""The coordinator under Flower: counts of codes, rounds of its FedAvg, and a last evaluation.

Its folders are those that FEDERATION_DATA, for plan.json, and FEDERATION_OUTPUT name.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from time import monotonic, sleep

from consortium import Plan, leave, vocabulary, weights_of
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

server = ServerApp()
WAIT = 60  # seconds for all hospitals to come


def sorted_answers(replies: Iterable[Message], hospitals: int) -> dict[str, RecordDict]:
    """Returns what each hospital answered, sorted by their names; all must have answered."""
    replies = list(replies)
    errors = [reply.error.reason for reply in replies if reply.has_error()]
    if errors or len(replies) != hospitals:
        raise RuntimeError(f"{len(replies)} answers of {hospitals}, with errors: {errors}")
    return dict(sorted((x.content["who"]["name"], x.content) for x in replies))


class Sorted(FedAvg):
    """Adds weights up in the order of the hospitals, so that a run gives the same bits again."""

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        replies = list(replies)
        sorted_answers(replies, self.min_train_nodes)
        replies.sort(key=lambda reply: reply.content["who"]["name"])
        return super().aggregate_train(server_round, replies)


@server.main()
def main(grid: Grid, context: Context) -> None:
    plan = Plan.read(Path(os.environ["FEDERATION_DATA"], "plan.json"))
    end = monotonic() + WAIT
    while len(nodes := list(grid.get_node_ids())) < plan.hospitals:
        if monotonic() > end:
            raise RuntimeError(f"{len(nodes)} of {plan.hospitals} hospitals came in {WAIT} s")
        sleep(0.1)

    def ask(kind: str, **records: ArrayRecord | ConfigRecord) -> dict[str, MetricRecord]:
        content = RecordDict(records)
        messages = [Message(content, dst_node_id=node, message_type=kind) for node in nodes]
        answers = sorted_answers(grid.send_and_receive(messages), plan.hospitals)
        return {name: content["metrics"] for name, content in answers.items()}

    agreed = {"plan": json.dumps(asdict(plan))}
    tokens = vocabulary(map(dict, ask("query", config=ConfigRecord(agreed)).values()))
    config = ConfigRecord(agreed | {"tokens": tokens})
    begin = {name: Array(x) for name, x in weights_of(plan.model(tokens)).items()}
    strategy = Sorted(
        fraction_evaluate=0.0,
        min_train_nodes=plan.hospitals,
        weighted_by_key="tokens",
        train_metrics_aggr_fn=lambda replies, _: MetricRecord(
            {reply["who"]["name"]: reply["metrics"]["epsilon"] for reply in replies}
        ),
    )
    done = strategy.start(grid, ArrayRecord(begin), plan.rounds, train_config=config)
    auprc = {k: x["auprc"] for k, x in ask("evaluate", arrays=done.arrays, config=config).items()}
    weights = {name: array.numpy() for name, array in done.arrays.items()}
    epsilon = dict(done.train_metrics_clientapp[plan.rounds])
    leave(Path(os.environ["FEDERATION_OUTPUT"]), weights, tokens, auprc=auprc, epsilon=epsilon)
