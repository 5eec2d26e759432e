"""context_parallel in one process: what it refuses, by name, and what goes on as before."""

import pytest
import torch
import torch.nn.functional as F
from encoders import CONFIGS, LONGFORMER, MODERN
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

import clinattn
from clinattn import context_parallel, fused_attention, fused_attention_varlen
from clinattn.encoder import Encoder
from clinattn.operator import split
from clinattn.parallel import gather, shard

Q = torch.randn(2, 3, 7, 8)
PACKED = torch.randn(7, 3, 8)
ENDS = torch.tensor((0, 3, 7), dtype=torch.int32)

WORDS = {
    "attn_mask": torch.ones(7, 7, dtype=torch.bool),
    "segment_ids": torch.zeros(2, 7, dtype=torch.int64),
    "dropout_p": 0.1,
    "alibi_slopes": torch.ones(3),
    "relative_bias": torch.ones(3, 5),
    "time_decay": torch.ones(3),
}


@pytest.mark.parametrize("word", WORDS)
def test_words_that_are_not_served(word, mesh):
    with context_parallel(mesh), pytest.raises(NotImplementedError, match=f"^{word}: not served"):
        fused_attention(Q, Q, Q, **{word: WORDS[word]})


CALLS = {
    "cross-attention": lambda: fused_attention(Q, Q[:, :, :5], Q[:, :, :5]),
    "cu_seqlens_k": lambda: fused_attention_varlen(
        PACKED, PACKED, PACKED, ENDS, torch.tensor((0, 4, 7), dtype=torch.int32)
    ),
    "times: ": lambda: fused_attention(
        Q, Q, Q, times=torch.arange(14.0).view(2, 7), time_window=1.0,
        kv_lengths=torch.tensor((3, 4)),
    ),
    "NestedTensor": lambda: fused_attention(*[nested()] * 3),
    "torch.func": lambda: torch.func.vmap(lambda q: fused_attention(q, q, q))(Q),
    "FusedAttention.apply": lambda: clinattn.FusedAttention.apply(Q, Q, Q),
    "attention_summary": lambda: clinattn.attention_summary(Q, Q),
    "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(Q, Q, Q),
    "expected 1-D inputs": lambda: Encoder(MODERN)(torch.ones(2, 5, dtype=torch.int64)),
    "global_projections": lambda: Encoder(LONGFORMER)(
        torch.ones(7, dtype=torch.int64), cu_seqlens=ENDS
    ),
    "torch's own|multi_head": lambda: torch.nn.MultiheadAttention(8, 1)(*[Q[0]] * 3),
}  # fmt: skip


def nested():
    return torch.nested.nested_tensor([Q[0, :, :3].mT, Q[1].mT], layout=torch.jagged).mT


@pytest.mark.parametrize("said", CALLS)
def test_calls_that_are_not_served(said, mesh):
    with context_parallel(mesh), pytest.raises(NotImplementedError, match=said):
        CALLS[said]()


def test_second_derivatives_are_not_served(mesh):
    q = Q.clone().requires_grad_()
    with context_parallel(mesh):
        o = fused_attention(q, q, q)
        with pytest.raises(NotImplementedError, match="second derivatives"):
            torch.autograd.grad(o.sum(), q, create_graph=True)


WRONG = {
    "got a last value of 6, expected that of whole": lambda: fused_attention_varlen(
        PACKED, PACKED, PACKED, torch.tensor((0, 3, 6), dtype=torch.int32)
    ),
    "kv_lengths: got values from 1 to 8": lambda: fused_attention(
        Q, Q, Q, kv_lengths=torch.tensor((1, 8))
    ),
    "window: ": lambda: fused_attention(Q, Q, Q, window=-3),
    "global_prefix: ": lambda: fused_attention(Q, Q, Q, window=1, global_prefix=-1),
    "global_prefix: got 8": lambda: fused_attention(Q, Q, Q, window=1, global_prefix=8),
    "times: row 1 decreases": lambda: fused_attention(
        Q, Q, Q, times=torch.tensor([[0.0] * 7, [2.0] * 3 + [1.0] * 4]), time_window=1.0
    ),
    "time_window: got a value without times": lambda: fused_attention(Q, Q, Q, time_window=1.0),
    "positions: ": lambda: Encoder(CONFIGS["bert"])(
        torch.ones(7, dtype=torch.int64), cu_seqlens=ENDS, positions=torch.arange(7) + 90
    ),
}


@pytest.mark.parametrize("said", WRONG)
def test_arguments_that_make_no_sense(said, mesh):
    with context_parallel(mesh), pytest.raises(ValueError, match=said):
        WRONG[said]()


def test_the_number_of_tokens_stays_the_same_in_a_block(mesh):
    with context_parallel(mesh):
        fused_attention(Q, Q, Q)
        with pytest.raises(ValueError, match="got 4 tokens after 7 in one context_parallel block"):
            fused_attention(*[Q[:, :, :4]] * 3)


def test_meshes(mesh):
    with (
        pytest.raises(TypeError, match="mesh: got int, expected a DeviceMesh"),
        context_parallel(1),
    ):
        pass
    square = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "sequence"))
    for call in (lambda: shard(square, Q), lambda: gather(square, Q), lambda: enter(square)):
        with pytest.raises(ValueError, match=r"mesh: got dimensions \('data', 'sequence'\)"):
            call()
    with context_parallel(mesh), pytest.raises(ValueError, match="inside another one"):
        enter(mesh)
    with pytest.raises(TypeError, match="gathered"):
        enter(mesh, gathered=2)


def enter(mesh, **words):
    with context_parallel(mesh, **words):
        pass


@pytest.mark.parametrize("dim", (-4, 3))
def test_dimensions_of_shards(dim, mesh):
    with pytest.raises(ValueError, match=f"dim: got {dim}"):
        shard(mesh, PACKED, dim)
    with pytest.raises(TypeError, match="x: got list"):
        gather(mesh, [1])


def test_a_block_that_fails_leaves_nothing_behind(mesh):
    with pytest.raises(KeyError), context_parallel(mesh):
        raise KeyError
    assert split.active is None
    q = torch.randn(1, 1, 3, 8)
    torch.testing.assert_close(fused_attention(q, q, q), F.scaled_dot_product_attention(q, q, q))


def test_forms_of_torch_are_taken(mesh):
    """Three and five dimensions, and keys that broadcast."""
    for q, k in ((Q[0], Q[0]), (Q[None], Q[None]), (Q, Q[:1])):
        expected = fused_attention(q, k, k, is_causal=True)
        with context_parallel(mesh):
            assert torch.equal(fused_attention(q, k, k, is_causal=True), expected)


def test_a_compiled_function_is_taken(mesh):
    encoder = Encoder(CONFIGS["global_prefix"]).eval()
    ids = torch.arange(7)
    expected = encoder(ids, cu_seqlens=ENDS)
    compiled = torch.compile(encoder, backend="eager")
    for _ in range(2):
        with context_parallel(mesh):
            torch.testing.assert_close(compiled(ids, cu_seqlens=ENDS), expected)
        torch.testing.assert_close(compiled(ids, cu_seqlens=ENDS), expected)


def test_recomputed_layers_are_taken(mesh):
    q = Q.clone().requires_grad_()
    with context_parallel(mesh):
        o = checkpoint(lambda q: fused_attention(q, q, q, window=2), q, use_reentrant=False)
        (dq,) = torch.autograd.grad(o.sum(), q)
    (expected,) = torch.autograd.grad(fused_attention(q, q, q, window=2).sum(), q)
    torch.testing.assert_close(dq, expected)


def test_shards_of_one_process_are_everything(mesh):
    assert torch.equal(shard(mesh, PACKED, -1), PACKED)
    assert torch.equal(gather(mesh, PACKED, -1), PACKED)
