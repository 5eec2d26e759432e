"""Runs of trainers that exist over packed rows, each in one process or in two over gloo.

A module of its own, because processes import it by name.
"""

import os
import socket
from contextlib import nullcontext

import packed_rows
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from support import assert_close
from torch.utils.data import DataLoader

from clinattn.integrations.trainer import (
    PackedDataLoader,
    PackedTrainer,
    PackingCollator,
    TokenBudgetSampler,
    lengths_of,
)
from clinattn.tools.model_report.parity import InDouble

MAX_TOKENS, EPOCHS, RATE, ACCUMULATE = 64, 3, 0.05, 2
COUNT = 33  # sequences: an odd number of batches, if nobody evens them
HEAD = "TokenClassification"


class Seen:
    """A dataset that writes down which sequences were read."""

    def __init__(self, rows):
        self.rows, self.read = rows, []

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        self.read.append(i)
        return self.rows[i]


def rows():
    return packed_rows.features(HEAD, COUNT)


def lengths():
    return [len(x["input_ids"]) for x in rows()]


def batches(processes, epoch, seed=0):
    """Sequences by step and process."""
    sampler = TokenBudgetSampler(lengths(), MAX_TOKENS, seed=seed, num_replicas=processes)
    sampler.set_epoch(epoch)
    found = list(sampler)
    return [found[i : i + processes] for i in range(0, len(found), processes)]


def by_hand(name, processes, dtype, accumulate=ACCUMULATE, tokens=True):
    """The weights after EPOCHS of plain SGD over padded rows: the mean over the labels of a step.

    tokens: False takes the mean over rows of their means, as loops do that know no better.
    """
    model = packed_rows.model(name, HEAD, False, dtype).train()
    data, context = rows(), InDouble() if dtype == torch.float64 else nullcontext()
    for epoch in range(EPOCHS):
        steps = batches(processes, epoch)
        for i in range(0, len(steps), accumulate):
            parts = [batch for step in steps[i : i + accumulate] for batch in step]
            total = sum(y != -100 for part in parts for j in part for y in data[j]["labels"])
            for part in parts:
                batch = packed_rows.padded([data[j] for j in part])
                n = int((batch["labels"] != -100).sum())
                with context:
                    loss = model(**batch).loss
                    (loss * (n / total if tokens else 1 / len(parts))).backward()
            with torch.no_grad():
                for x in model.parameters():
                    if x.grad is not None:
                        x -= RATE * x.grad
                        x.grad = None
    return dict(model.state_dict())


def by_module(weights):
    """Weight and bias in one: a key's bias moves by what cancels in its gradient alone."""
    found = {}
    for name, x in weights.items():
        found.setdefault(name.rpartition(".")[0], []).append(x.flatten())
    return {name: torch.cat(parts) for name, parts in found.items()}


def assert_weights_close(actual, name, processes, accumulate=ACCUMULATE):
    hand = lambda dtype: by_module(by_hand(name, processes, dtype, accumulate=accumulate))
    truth, naive, actual = hand(torch.float64), hand(torch.float32), by_module(actual)
    assert actual.keys() == truth.keys()
    for module in truth:
        assert_close(module, actual[module], truth[module], naive[module])


def read_by(rank, processes):
    """The sequences that a process reads in all epochs."""
    steps = [step for epoch in range(EPOCHS) for step in batches(processes, epoch)]
    return [i for step in steps for i in step[rank]]


def arguments(folder, **more):
    from transformers import TrainingArguments

    words = {
        "num_train_epochs": EPOCHS, "learning_rate": RATE, "optim": "sgd", "max_grad_norm": 0,
        "lr_scheduler_type": "constant", "gradient_accumulation_steps": ACCUMULATE,
        "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0,
        "save_strategy": "no", "logging_strategy": "no",
    }  # fmt: skip
    return TrainingArguments(str(folder), **words | more)


def transformers_run(folder, name, resume=None, head=HEAD, evaluate=False, dropout=False, **more):
    """PackedTrainer: weights, sequences read in each epoch, evaluation."""
    data = Seen(packed_rows.features(head, COUNT))
    word = {"bert": "attention_probs_dropout_prob", "modernbert": "attention_dropout"}[name]
    model = packed_rows.model(name, head, **({word: 0.2} if dropout else {}))
    trainer = PackedTrainer(
        model, arguments(folder, **more), train_dataset=data, eval_dataset=data.rows,
        max_tokens=MAX_TOKENS,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    found = {"weights": dict(model.state_dict()), "read": data.read[COUNT:]}
    if evaluate:
        trainer.compute_metrics = lambda x: {"rows": len(x.predictions)}
        found["predicted"] = trainer.predict(data.rows)
        found["evaluated"] = trainer.evaluate()
    return found


def accelerate_run(folder, name, resume=False):
    """A loop over accelerate: weights, sequences of this process in each epoch."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = packed_rows.model(name, HEAD)
    data = Seen(rows())
    sampler = TokenBudgetSampler(lengths(), MAX_TOKENS)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=PackingCollator(model))
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    done, interrupted = 0, len(loader) + 2  # in the second epoch
    if resume:
        accelerator.load_state(f"{folder}/state")
        done = interrupted
    for epoch in range(done // len(loader), EPOCHS):
        loader.set_epoch(epoch)
        skipped = done % len(loader)
        rest = accelerator.skip_first_batches(loader, skipped) if skipped else loader
        for batch in rest:
            loss = model(**batch).loss
            n = batch["labels"].ne(-100).sum()
            total = accelerator.reduce(n, "sum")
            accelerator.backward(loss * n / total * accelerator.num_processes)
            optimizer.step()
            optimizer.zero_grad()
            done += 1
            if done == interrupted and not resume:
                accelerator.save_state(f"{folder}/state")
    weights = accelerator.unwrap_model(model).state_dict()
    return {"weights": dict(weights), "read": data.read}


def lightning_run(folder, name, resume=None, devices=1, flag=True):
    """Lightning's Trainer: weights, sequences of this process."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = packed_rows.model(name, HEAD)

        def training_step(self, batch, index):
            n = batch["labels"].ne(-100).sum()
            total = n.clone()
            if dist.is_initialized():
                dist.all_reduce(total)
            return self.model(**batch).loss * n / total * self.trainer.world_size

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), RATE)

    module, data = Module(), Seen(rows())
    sampler = TokenBudgetSampler(lengths_of(data.rows), MAX_TOKENS)
    loader = PackedDataLoader(
        data, batch_sampler=sampler, collate_fn=PackingCollator(module.model)
    )  # fmt: skip
    saved = lightning.pytorch.callbacks.ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=1, save_top_k=-1
    )
    environment = {}
    if devices > 1:
        from lightning.fabric.plugins.environments import TorchElasticEnvironment

        environment = {"plugins": [TorchElasticEnvironment()], "strategy": "ddp"}
    trainer = lightning.Trainer(
        accelerator="cpu", devices=devices, max_epochs=EPOCHS, logger=False, callbacks=[saved],
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=flag,
        **environment,
    )  # fmt: skip
    trainer.fit(module, loader, ckpt_path=resume)
    return {"weights": dict(module.model.state_dict()), "read": data.read, "steps": len(loader)}


def _worker(rank, port, folder, calls):
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2",
        "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2",
        "TORCHELASTIC_RUN_ID": "tests", "GROUP_RANK": "0",
    }  # fmt: skip
    results = [globals()[function](*args, **words) for function, args, words in calls]
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, and its destructor would abort the process


def in_two_processes(folder, *calls):
    """Results of each call (function, args, words), by process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.spawn(_worker, (port, str(folder), calls), nprocs=2)
    return [torch.load(f"{folder}/rank{rank}.pt", weights_only=False) for rank in range(2)]
