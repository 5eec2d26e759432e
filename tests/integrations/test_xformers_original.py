"""xformers' names, arguments and biases against the package itself, where it is installed.

Its biases say what they mean without a GPU: materialize() makes the N x N tensor.
"""

import inspect
import random
import warnings

import pytest
import torch
from xformers_calls import draw, qkv

from clinattn.integrations import xformers as ours
from clinattn.integrations.xformers import attn_bias as our_biases
from clinattn.integrations.xformers import fmha as our_fmha
from clinattn.integrations.xformers import ops as our_ops

pytest.importorskip("xformers")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import xformers.ops
theirs = xformers.ops.fmha.attn_bias

PAGE, PADDING = 4, 12
LENGTHS = range(1, 9)


def draws(seed):
    """Returns (lengths of queries, of keys no shorter, starts of keys, a table of pages)."""
    random.seed(seed)
    queries = [random.choice(LENGTHS) for _ in range(4)]
    keys = [random.randint(n, PADDING - 2) for n in queries]
    skipped = [random.randint(0, PADDING - n) for n in keys]
    starts = [PADDING * i + start for i, start in enumerate(skipped)]
    pages = random.sample(range(4 * PADDING // PAGE), 4 * PADDING // PAGE)
    table = torch.tensor(pages, dtype=torch.int32).view(4, -1)
    return queries, keys, [*starts, 4 * PADDING], table


def whole(module, queries, keys, *_):
    return module.BlockDiagonalMask.from_seqlens(queries, keys)


def padded(module, queries, keys, *_, cls="BlockDiagonalPaddedKeysMask"):
    return getattr(module, cls).from_seqlens(queries, PADDING, keys)


def padded_local(module, queries, keys, *_):
    cls = module.BlockDiagonalCausalLocalAttentionPaddedKeysMask
    return cls.from_seqlens_local(queries, PADDING, keys, 3)


def gappy(module, queries, keys, starts, _, cls="BlockDiagonalGappyKeysMask"):
    return getattr(module, cls).from_seqlens(queries, starts, keys)


def gappy_local(module, queries, keys, starts, _):
    cls = module.BlockDiagonalLocalAttentionFromBottomRightGappyKeysMask
    return cls.from_seqlens_local_gappy(queries, starts, keys, 2, 1, torch.device("cpu"))


def in_pages(name, made=padded):
    def paged(module, queries, keys, starts, table):
        size = (PAGE,) if made in (padded, padded_local) else (PAGE, PADDING)
        bias = made(module, queries, keys, starts, table)
        return bias.make_paged(table, *size, getattr(module, name))

    return paged


def paged(name):
    def paged(module, queries, keys, starts, table):
        return getattr(module, name).from_seqlens(queries, keys, table, PAGE)

    return paged


def after_update(module, queries, keys, *_):
    """Of other lengths, which then became these."""
    bias = padded(module, [8] * 4, [PADDING] * 4)
    bias.q_seqinfo.from_seqlens_inplace(queries)
    bias.k_seqinfo.from_seqlens_padded_inplace(keys)
    return bias


BIASES = {
    "full": whole,
    "causal": lambda *of: whole(*of).make_causal(),
    "causal at the end": lambda *of: whole(*of).make_causal_from_bottomright(),
    "local": lambda *of: whole(*of).make_local_attention(9),
    "local at the end": lambda *of: whole(*of).make_local_attention_from_bottomright(3),
    "padded": padded,
    "padded, causal": lambda *of: padded(*of, cls="BlockDiagonalCausalWithOffsetPaddedKeysMask"),
    "padded, local": lambda *of: padded(*of).make_local_attention(2, 1),
    "padded, causal local": padded_local,
    "padded, updated": after_update,
    "gappy": gappy,
    "gappy, causal": lambda *of: gappy(*of, cls="BlockDiagonalCausalWithOffsetGappyKeysMask"),
    "gappy, local": gappy_local,
    "paged": paged("PagedBlockDiagonalPaddedKeysMask"),
    "paged, causal": paged("PagedBlockDiagonalCausalWithOffsetPaddedKeysMask"),
    "paged, made": in_pages("PagedBlockDiagonalPaddedKeysMask"),
    "paged, made causal": in_pages("PagedBlockDiagonalCausalWithOffsetPaddedKeysMask"),
    "paged, made local": in_pages("PagedBlockDiagonalCausalLocalPaddedKeysMask", padded_local),
    "paged, gappy": in_pages("PagedBlockDiagonalGappyKeysMask", gappy),
    "paged, gappy, causal": in_pages("PagedBlockDiagonalCausalWithOffsetGappyKeysMask", gappy),
}


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("make", BIASES.values(), ids=list(BIASES))
def test_biases(make, seed):
    """The same where they are written out, and the same result by either object."""
    of = draws(seed)
    bias = make(our_biases, *of)
    try:
        original = make(theirs, *of)
    except AttributeError as error:
        pytest.skip(f"this version of xformers: {error}")
    assert type(original).__name__ == type(bias).__name__
    ends = bias.q_seqinfo.seqstart_py[-1], bias.k_seqinfo.seqstart_py[-1]
    tokens = (ends[0], 4 * PADDING if hasattr(bias, "block_tables") else ends[1])
    dense = original.materialize((2, *tokens))
    assert torch.equal(bias.materialize((2, *tokens)), dense)
    q, k, v = qkv(1, tokens[0], dense.shape[-1], 2)
    out = ours.memory_efficient_attention(q, k, v, bias)
    assert torch.equal(ours.memory_efficient_attention(q, k, v, original), out)
    expected = ours.memory_efficient_attention(q, k, v, dense[:1, None].expand(-1, 2, -1, -1))
    torch.testing.assert_close(out, expected)


DENSE = {
    "causal": lambda module: module.LowerTriangularMask(device="cpu"),
    "causal at the end": lambda module: module.LowerTriangularFromBottomRightMask(),
    "causal local": lambda module: module.LowerTriangularFromBottomRightMask().make_local_attention(
        3
    ),
    "local": lambda module: module.LocalAttentionFromBottomRightMask(2, 1),
    "tensor": lambda module: module.LowerTriangularMask().add_bias(draw(1, 2, 7, 9)),
}


@pytest.mark.parametrize("make", DENSE.values(), ids=list(DENSE))
def test_dense_biases(make):
    original = make(theirs)
    dense = original.materialize((1, 2, 7, 9))
    torch.testing.assert_close(make(our_biases).materialize((1, 2, 7, 9)), dense)
    q, k, v = qkv(1, 7, 9, 2)
    out = ours.memory_efficient_attention(q, k, v, original)
    torch.testing.assert_close(out, ours.memory_efficient_attention(q, k, v, dense))


@pytest.mark.parametrize(
    "module, original",
    [(our_ops, xformers.ops), (our_fmha, xformers.ops.fmha), (our_biases, theirs)],
    ids=["ops", "fmha", "attn_bias"],
)
def test_names_and_arguments(module, original):
    """xformers has each served name, with the same arguments in the same order."""
    for name in module.__all__:
        if module is our_biases and not hasattr(original, name):
            continue  # a bias of a later version
        mine, other = getattr(module, name), getattr(original, name)
        if inspect.isfunction(mine):
            arguments, others = (list(inspect.signature(x).parameters) for x in (mine, other))
            assert arguments == others, name
        for method in ("from_seqlens", "from_seqlens_local", "make_paged", "make_local_attention"):
            if inspect.isclass(mine) and hasattr(other, method):
                pair = (getattr(x, method) for x in (mine, other))
                arguments, others = (list(inspect.signature(x).parameters) for x in pair)
                assert [x for x in arguments if x != "device"] == [
                    x for x in others if x != "device"
                ], f"{name}.{method}"


def test_no_bias_is_missing():
    """Every class of xformers is known here."""
    classes = [
        name
        for name, cls in inspect.getmembers(theirs, inspect.isclass)
        if issubclass(cls, theirs.AttentionBias)
    ]
    assert len(classes) > 20 and not [x for x in classes if not hasattr(our_biases, x)]
