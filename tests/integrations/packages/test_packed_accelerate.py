"""accelerate over packed rows, in one process and in two."""

import pytest
import torch

for package in ("transformers", "accelerate"):
    pytest.importorskip(package)

import trained  # noqa: E402


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_a_loop_learns_as_by_hand_and_goes_on(name, tmp_path):
    whole = trained.accelerate_run(tmp_path, name)
    assert whole["read"] == trained.read_by(0, 1)
    trained.assert_weights_close(whole["weights"], name, 1, accumulate=1)
    resumed = trained.accelerate_run(tmp_path, name, resume=True)
    assert resumed["read"] == whole["read"][-len(resumed["read"]) :] != whole["read"]
    for weight, x in whole["weights"].items():
        assert torch.equal(resumed["weights"][weight], x)


def test_two_processes(tmp_path):
    """accelerate shares out the batches: each process its own, no sequence twice."""
    ranks = trained.in_two_processes(
        tmp_path,
        ("accelerate_run", (tmp_path, "bert"), {}),
        ("accelerate_run", (tmp_path, "bert"), {"resume": True}),
    )
    for rank, (whole, resumed) in enumerate(ranks):
        assert whole["read"] == trained.read_by(rank, 2)
        assert resumed["read"] == whole["read"][-len(resumed["read"]) :] != whole["read"]
        for weight, x in whole["weights"].items():
            assert torch.equal(resumed["weights"][weight], x)
        trained.assert_weights_close(whole["weights"], "bert", 2, accumulate=1)


def test_a_packed_loader_is_shared_out_once(monkeypatch):
    """accelerate takes the sampler of a PackedDataLoader, which would share out by itself."""
    from accelerate.data_loader import prepare_data_loader

    from clinattn.integrations.trainer import PackedDataLoader, TokenBudgetSampler

    sampler = TokenBudgetSampler(trained.lengths(), trained.MAX_TOKENS, num_replicas=2)
    loader = PackedDataLoader(range(trained.COUNT), batch_sampler=sampler, collate_fn=list)
    shares = [
        list(prepare_data_loader(loader, num_processes=2, process_index=rank)) for rank in range(2)
    ]
    assert list(zip(*shares, strict=True)) == [tuple(x) for x in trained.batches(2, 0)]


def test_split_batches_is_refused_by_accelerate():
    from accelerate.data_loader import prepare_data_loader

    from clinattn.integrations.trainer import TokenBudgetSampler

    sampler = TokenBudgetSampler(trained.lengths(), trained.MAX_TOKENS)
    loader = torch.utils.data.DataLoader(range(trained.COUNT), batch_sampler=sampler)
    with pytest.raises(ValueError, match="split_batches"):
        prepare_data_loader(loader, num_processes=2, process_index=0, split_batches=True)
