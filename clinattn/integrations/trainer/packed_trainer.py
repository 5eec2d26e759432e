"""transformers' Trainer over packed rows."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, IterableDataset
from transformers import DataCollatorWithPadding, Trainer, TrainerCallback, default_data_collator
from transformers.trainer_utils import EvalLoopOutput, seed_worker

from clinattn.integrations.trainer.collator import PackingCollator
from clinattn.integrations.trainer.lengths import lengths_of
from clinattn.integrations.trainer.sampler import TokenBudgetSampler
from clinattn.integrations.trainer.split import ENDS, padded

_Base: Any = Trainer if TYPE_CHECKING else object


class PackedBatches(_Base):
    """Gives a Trainer packed rows: `class Mine(PackedBatches, TheirTrainer)`.

    max_tokens: the budget of a row, in place of per_device_train_batch_size and of
    per_device_eval_batch_size. max_length: where longer sequences are cut; None refuses what is
    over the budget. The other arguments are those of the Trainer; a data_collator that makes padded
    batches is served (see PackingCollator). Lengths come from the column length_column_name, else
    each dataset is read once.

    Training: epochs, seeds (data_seed, else seed), accumulation, resuming and numbers of processes
    are as in Trainer. A step's loss is the mean over all labels of the step, whatever the model
    does with num_items_in_batch. Evaluation: predictions and labels are those of sequences in the
    order of the dataset, (S, N, ...) filled up with -100, or (S, ...); the loss is the mean over
    all labels.

    Raises ValueError and NotImplementedError, at once, for what packed rows do not go with.
    """

    data_collator: Any

    def __init__(self, *args: Any, max_tokens: int, max_length: int | None = None, **words: Any):
        if words.get("model_init") is not None:
            raise ValueError("model_init: expected a model, which is run once to check it")
        super().__init__(*args, **words)
        self.max_tokens, self.max_length = max_tokens, max_length
        _check(self)
        given = self.data_collator
        if not isinstance(given, PackingCollator):
            plain = given is default_data_collator or isinstance(given, DataCollatorWithPadding)
            self.data_collator = PackingCollator(
                self.model, None if plain else given, max_length=max_length
            )
        self._lengths: dict[int, tuple[Any, list[int]]] = {}
        self._epochs = _Epochs()
        self.add_callback(self._epochs)

    def get_train_dataloader(self) -> DataLoader:
        if self.train_dataset is None:
            raise ValueError("Trainer: training requires a train_dataset.")
        order = getattr(self.args, "train_sampling_strategy", "random")
        sampler = self._sampler(self.train_dataset, order != "sequential")
        self._epochs.sampler = sampler
        seeded = partial(
            seed_worker,
            num_workers=self.args.dataloader_num_workers,
            rank=self.args.process_index,
        )
        return self._loader(self.train_dataset, sampler, "Training", worker_init_fn=seeded)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("Trainer: evaluation requires an eval_dataset.")
        return self._loader(dataset, self._sampler(dataset, False), "Evaluation")

    def get_test_dataloader(self, test_dataset: Any) -> DataLoader:
        return self._loader(test_dataset, self._sampler(test_dataset, False), "test")

    def _sampler(self, dataset: Any, shuffle: bool) -> TokenBudgetSampler:
        if isinstance(dataset, IterableDataset):
            raise ValueError(
                f"dataset: {type(dataset).__name__} is iterable, expected a map-style dataset, "
                "whose sequences can be put into batches by a budget"
            )
        args = self.args
        return TokenBudgetSampler(
            self._lengths_of(dataset),
            self.max_tokens,
            max_length=self.max_length,
            shuffle=shuffle,
            seed=args.seed if args.data_seed is None else args.data_seed,
            num_replicas=self.accelerator.num_processes,
        )

    def _lengths_of(self, dataset: Any) -> list[int]:
        """The lengths of a dataset, counted once: evaluation may come often."""
        if id(dataset) not in self._lengths:
            progress = not self.args.disable_tqdm and self.is_local_process_zero()
            lengths = lengths_of(dataset, self.args.length_column_name, progress)
            self._lengths[id(dataset)] = dataset, lengths
        return self._lengths[id(dataset)][1]

    def _loader(
        self, dataset: Any, sampler: TokenBudgetSampler, description: str, **words: Any
    ) -> DataLoader:
        args = self.args
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self._get_collator_with_removed_columns(
                self.data_collator, description=description
            ),
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers and description == "Training",
            prefetch_factor=args.dataloader_prefetch_factor,
            **words,
        )
        return self.accelerator.prepare(loader)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The loss of a row; in training, its share of the mean over all labels of the step."""
        if num_items_in_batch is None:
            return super().compute_loss(model, inputs, return_outputs)
        n = inputs["labels"].ne(-100).sum()
        if self.compute_loss_func or self.label_smoother:
            count = num_items_in_batch if model.training else n
            loss, outputs = super().compute_loss(model, inputs, True, count)
            if not model.training and self.args.average_tokens_across_devices:
                loss = loss / self.accelerator.num_processes
        else:
            # Many models return the mean over the row and do not read num_items_in_batch.
            loss, outputs = super().compute_loss(model, inputs, True)
            if model.training:
                if not n:  # the mean over nothing is NaN
                    loss = sum(x.sum() for x in _results(outputs)) * 0.0
                share = n / torch.as_tensor(num_items_in_batch).clamp(min=1)
                if self.args.average_tokens_across_devices:
                    share = share * self.accelerator.num_processes
                loss = loss * share
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """(loss, logits and labels of each sequence of a row)."""
        loss, logits, labels = super().prediction_step(
            model, inputs, prediction_loss_only, ignore_keys=ignore_keys
        )
        if loss is not None:
            given = inputs.get("labels", inputs[ENDS][1:])
            n = given.ne(-100).sum().to(loss.device)
            self._losses += torch.stack([torch.where(n > 0, loss * n, 0.0).double(), n.double()])
        ends = inputs[ENDS].tolist()
        return loss, _nested(logits, "logits", ends), _nested(labels, "labels", ends)

    def evaluation_loop(self, dataloader: DataLoader, *args: Any, **words: Any) -> EvalLoopOutput:
        """Trainer's own, with results of sequences in the order of the dataset."""
        prefix = words.get("metric_key_prefix", args[3] if len(args) > 3 else "eval")
        self._losses = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        self.gather_function = self._gather
        output = super().evaluation_loop(dataloader, *args, **words)
        if f"{prefix}_loss" in output.metrics:
            total, n = self.accelerator.reduce(self._losses, "sum").tolist()
            output.metrics[f"{prefix}_loss"] = total / n if n else float("nan")
        return output

    def _gather(self, x: Any) -> Any:
        """The rows of all processes, which may differ in number, one process after the other."""
        if isinstance(x, (tuple, list)):
            return type(x)(self._gather(y) for y in x)
        accelerator = self.accelerator
        if accelerator.num_processes == 1:
            return x
        counts = accelerator.gather(torch.tensor([len(x)], device=x.device)).tolist()
        most = max(counts)
        filled = pad(x, (0, 0) * (x.dim() - 1) + (0, most - len(x)))
        parts = accelerator.gather(filled.contiguous()).split(most)
        return torch.cat([part[:n] for part, n in zip(parts, counts, strict=True)])


class PackedTrainer(PackedBatches, Trainer):
    """transformers' Trainer with packed rows of at most max_tokens tokens; see PackedBatches."""


class _Epochs(TrainerCallback):
    """Tells the sampler the epoch, which accelerate does not where batches are skipped."""

    sampler: TokenBudgetSampler | None = None

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **words: Any) -> None:
        if self.sampler is not None:
            self.sampler.set_epoch(int(state.epoch or 0))


def _check(trainer: Any) -> None:
    """Refuses settings that packed rows do not go with."""
    args, accelerator = trainer.args, trainer.accelerator
    order = getattr(args, "train_sampling_strategy", "random")
    if order not in ("random", "sequential") or getattr(args, "group_by_length", False):
        raise ValueError(
            f"train_sampling_strategy: got {order!r}, expected 'random' or 'sequential': packed "
            "rows have no padding to save"
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"got one process with {args.n_gpu} GPUs, whose DataParallel cuts a row into pieces; "
            "expected a process for each, as torchrun or accelerate launch starts them"
        )
    if args.auto_find_batch_size:
        raise ValueError("auto_find_batch_size: expected False; lower max_tokens instead")
    if accelerator.dispatch_batches or accelerator.split_batches:
        raise ValueError(
            "accelerator_config: got dispatch_batches or split_batches, which cut rows into "
            "pieces; expected neither"
        )
    if getattr(accelerator, "parallelism_config", None) is not None:
        raise NotImplementedError("parallelism_config: packed rows are for data parallel training")
    if "inputs" in args.include_for_metrics:
        raise NotImplementedError(
            "include_for_metrics: got 'inputs', which are packed; expected metrics of predictions "
            "and labels"
        )


def _results(outputs: Any) -> list[Tensor]:
    values = outputs.values() if isinstance(outputs, dict) else outputs
    return [x for x in values if isinstance(x, Tensor) and x.requires_grad and x.dim()]


def _nested(x: Any, name: str, ends: list[int]) -> Any:
    if isinstance(x, (tuple, list)):
        return type(x)(_nested(y, name, ends) for y in x)
    return x if x is None else padded(name, x, ends)
