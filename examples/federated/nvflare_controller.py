"""The coordinator under NVFLARE: counts of codes, rounds of FedAvg, and a last evaluation.

NVFLARE's own FedAvg adds up results as they arrive, and its sums are rounded differently each time.
This one sorts them by hospital first, so that a run gives the same bits again.
"""

from collections.abc import Sequence
from pathlib import Path

from consortium import Plan, Trained, Weights, average, leave, vocabulary, weights_of
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.model_controller import ModelController


class Consortium(ModelController):
    """plan: fields of a Plan. output: a folder for the weights."""

    def __init__(self, plan: dict, output: str):
        super().__init__(persistor_id="")
        self.plan, self.output = plan, output

    def run(self) -> None:
        plan = Plan(**self.plan)
        tokens = vocabulary(reply.meta["counts"] for reply in self.ask("counts").values())
        weights = weights_of(plan.model(tokens))
        for number in range(plan.rounds):
            replies = self.ask("train", weights, tokens, number)
            weights = average(
                [Trained(x.params, x.meta["tokens"], x.meta["epsilon"]) for x in replies.values()]
            )
        epsilon = {name: reply.meta["epsilon"] for name, reply in replies.items()}
        finished = self.ask("finish", weights, tokens)
        auprc = {name: reply.meta["auprc"] for name, reply in finished.items()}
        leave(Path(self.output), weights, tokens, auprc=auprc, epsilon=epsilon)

    def ask(
        self, task: str, weights: Weights | None = None, tokens: Sequence[str] = (), number: int = 0
    ) -> dict[str, FLModel]:
        """Returns the answers of all hospitals, sorted by their names."""
        meta = {"plan": self.plan, "tokens": list(tokens)}
        message = FLModel(params=weights or {}, current_round=number, meta=meta)
        replies = self.send_model_and_wait(task_name=task, data=message)
        if len(replies) != self.plan["hospitals"]:
            raise RuntimeError(f"{task}: {len(replies)} answers of {self.plan['hospitals']}")
        of = {reply.meta["client_name"]: reply for reply in replies}
        return dict(sorted(of.items()))
