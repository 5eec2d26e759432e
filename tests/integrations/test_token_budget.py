"""TokenBudgetSampler and PackedDataLoader: budgets, epochs, shares of processes, resuming."""

import statistics
from itertools import chain

import pytest
import torch
from torch.utils.data import DataLoader

from clinattn.integrations.trainer import PackedDataLoader, TokenBudgetSampler, lengths_of

BUDGET = 512


def drawn(n, longest=BUDGET, seed=0):
    """Lengths of notes: many short ones, few long ones."""
    x = torch.empty(n).log_normal_(4.0, 1.0, generator=torch.Generator().manual_seed(seed))
    return x.clamp(1, longest).long()


LENGTHS = {
    "notes": drawn(1000),
    "one each": torch.full((12,), BUDGET),
    "over half": torch.full((24,), BUDGET // 2 + 1),
    "chunky": torch.tensor([400, 300, 200, 200, 200, 150, 112, 100] * 6),
    "few": torch.tensor([5, 1, 3, 4, 9]),
}
CASES = [(name, n, shuffle) for name in LENGTHS for n in (1, 2, 3, 4) for shuffle in (True, False)]
IDS = [f"{name}-{n}-{'shuffled' if shuffle else 'in order'}" for name, n, shuffle in CASES]


@pytest.mark.parametrize("name, n, shuffle", CASES, ids=IDS)
def test_every_sequence_once_within_the_budget_and_as_many_batches_each_epoch(name, n, shuffle):
    lengths = LENGTHS[name]
    sampler = TokenBudgetSampler(lengths, BUDGET, shuffle=shuffle, num_replicas=n)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert sorted(chain(*batches)) == list(range(len(lengths)))
        assert max(int(lengths[batch].sum()) for batch in batches) <= BUDGET
        assert len(batches) == len(sampler) and len(batches) % n == 0 and all(batches)
        if not shuffle:
            assert list(chain(*batches)) == list(range(len(lengths)))


@pytest.mark.parametrize("n", [1, 8])
def test_batches_are_full_and_alike(n):
    """Few more batches than tokens need, and none much smaller: processes wait for the largest."""
    lengths = LENGTHS["notes"]
    sampler = TokenBudgetSampler(lengths, BUDGET, num_replicas=n)
    needed = int(lengths.sum()) / BUDGET
    assert len(sampler) <= needed * 1.05 + n
    sizes = [int(lengths[batch].sum()) for batch in sampler]
    assert max(sizes) - min(sizes) <= 0.05 * statistics.mean(sizes)


def test_an_epoch_has_its_own_order_and_company():
    sampler = TokenBudgetSampler(LENGTHS["notes"], BUDGET)

    def epoch(sampler, i):
        sampler.set_epoch(i)
        return list(sampler)

    first, second = epoch(sampler, 0), epoch(sampler, 1)
    companions = lambda batches: {(min(a, b), max(a, b)) for x in batches for a in x for b in x}
    both = companions(first) & companions(second)
    assert len(both - {(i, i) for i in range(1000)}) < 0.1 * len(companions(first))
    assert (
        first == epoch(sampler, 0) != epoch(TokenBudgetSampler(LENGTHS["notes"], BUDGET, seed=1), 0)
    )


@pytest.mark.parametrize("name", ["three alone", "fewer than processes"])
@pytest.mark.parametrize("shuffle", [True, False])
def test_what_cannot_be_shared_evenly_is_refused(name, shuffle):
    lengths, n = ([BUDGET] * 3, 2) if name == "three alone" else ([3, 4], 3)
    with pytest.raises(ValueError, match="do not make the same number of batches for each of"):
        list(TokenBudgetSampler(lengths, BUDGET, shuffle=shuffle, num_replicas=n))


@pytest.mark.parametrize(
    "lengths, words, error, message",
    [
        ([3, BUDGET + 1], {}, ValueError, "sequence 1 has 513 tokens, over max_tokens=512"),
        ([3, 9], {"max_length": BUDGET + 1, "max_tokens": 5}, ValueError, "sequence 1 has 9"),
        ([3, 0], {}, ValueError, "sequence 1 has no tokens"),
        ([], {}, TypeError, "expected integers"),
        ([1.5], {}, TypeError, "expected integers"),
        ([[1]], {}, TypeError, "expected integers"),
        ([1], {"max_tokens": 0}, ValueError, "max_tokens: got 0"),
        ([1], {"max_length": True}, ValueError, "max_length: got True"),
        ([1], {"num_replicas": 0}, ValueError, "num_replicas: got 0"),
    ],
)
def test_bad_input_is_refused(lengths, words, error, message):
    with pytest.raises(error, match=message):
        TokenBudgetSampler(lengths, **{"max_tokens": BUDGET} | words)


def test_long_sequences_count_as_they_are_cut():
    sampler = TokenBudgetSampler([3, 10 * BUDGET], BUDGET, max_length=BUDGET - 3)
    assert sorted(next(iter(sampler))) == [0, 1]


class Environment:
    """Makes this process one of several."""

    def __init__(self, monkeypatch, n):
        self.set = monkeypatch.setenv
        self.set("WORLD_SIZE", str(n))

    def rank(self, rank):
        self.set("RANK", str(rank))


def loader(lengths, workers=0, **words):
    data = [{"input_ids": [i] * n} for i, n in enumerate(lengths.tolist())]
    sampler = TokenBudgetSampler(lengths_of(data), BUDGET, **words)
    collate = lambda features: [x["input_ids"][0] for x in features]
    return PackedDataLoader(data, batch_sampler=sampler, collate_fn=collate, num_workers=workers)


def test_each_process_has_its_share(monkeypatch):
    environment = Environment(monkeypatch, 3)
    made = loader(LENGTHS["notes"])
    shares = []
    for rank in range(3):
        environment.rank(rank)
        shares.append(list(made))
    assert [len(x) for x in shares] == [len(made)] * 3
    assert sorted(chain(*chain(*shares))) == list(range(1000))
    # as accelerate's shards are: batch i of all for process i % 3
    assert list(chain(*zip(*shares, strict=True))) == list(made.batch_sampler)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_behind_what_was_given_out(workers, monkeypatch):
    environment = Environment(monkeypatch, 2)
    environment.rank(1)
    whole = loader(LENGTHS["notes"], workers)
    whole.set_epoch(3)
    batches = list(whole)
    interrupted = loader(LENGTHS["notes"], workers)
    interrupted.set_epoch(3)
    for _, batch in zip(range(5), interrupted, strict=False):
        assert batch in batches[:5]
    state = interrupted.state_dict()
    resumed = loader(LENGTHS["notes"], workers)
    resumed.load_state_dict(state)
    resumed.set_epoch(3)  # as trainers do before every epoch
    assert list(resumed) == batches[5:]
    assert list(resumed) == batches  # the next pass is whole
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert len(list(resumed)) == len(batches)
    # behind the last batch comes the next epoch
    resumed.load_state_dict(resumed.state_dict())
    assert resumed.budget.epoch == 5 and len(list(resumed)) == len(batches)


def test_a_state_of_other_data_is_refused():
    state = loader(LENGTHS["notes"]).state_dict()
    for other in (loader(LENGTHS["notes"], seed=1), loader(LENGTHS["notes"][1:])):
        with pytest.raises(ValueError, match="expected the same data, budget, seed"):
            other.load_state_dict(state)


def test_another_sampler_is_refused():
    with pytest.raises(TypeError, match="got BatchSampler, expected a TokenBudgetSampler"):
        PackedDataLoader([1], batch_sampler=DataLoader([1]).batch_sampler)


class Table:
    """A dataset with columns."""

    def __init__(self, **columns):
        self.columns, self.column_names = columns, list(columns)

    def __len__(self):
        return len(self.columns["input_ids"])

    def __getitem__(self, key):
        if isinstance(key, str):
            return self.columns[key]
        return {name: x[key] for name, x in self.columns.items()}


def test_lengths_come_from_a_column_or_are_counted():
    ids, mask = [[1, 2, 3], [4]], [[1, 1, 0], [1]]
    assert lengths_of(Table(input_ids=ids)) == [3, 1]
    assert lengths_of(Table(input_ids=ids, attention_mask=mask)) == [2, 1]
    assert lengths_of(Table(input_ids=ids, length=[7, 8])) == [7, 8]
    assert lengths_of(Table(input_ids=ids, n=[7, 8]), column="n") == [7, 8]
    with pytest.raises(TypeError, match="without input_ids"):
        lengths_of(range(3))
    with pytest.raises(TypeError, match="has no length"):
        lengths_of(iter(ids))
