"""Forward attention for Hopper in Gluon: one warp loads tiles while others multiply.

A query tile has 64 queries for each consumer, which is a warp group. A producer warp copies tiles
of K and V into two rings in shared memory, in the order in which consumers read them: K_0, K_1,
V_0, K_2, V_1, .... A consumer has q k^T of one tile and p v of the tile before in flight together,
and computes the softmax of the first while the second runs. Method: FlashAttention-3, arXiv
2407.08608.

Results have the bits of forward.py, which serves the calls that this kernel does not take. Both
visit the same 128 keys at a time, the first ones first, edges included, by products m64n128k16 with
the same layout of their results, so that a row is reduced in the same order. Both round where the
other does: an fma is one that is written, and no product is fused with the sum after it. A tile
that is hidden from a row leaves its sums as they are. Rows of large scores (LARGE in score.py)
are left to forward.py: their lse is NaN.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .score import LARGE

# Triton 3.9 has another name for it.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
NOT_SPECIALIZED = [
    "num_items", "num_tiles", "num_heads", "seqlen_q", "seqlen_k", "offset",
]  # fmt: skip


@gluon.jit
def _count_tiles(item, sizes, PAIRS: gl.constexpr):
    """Query tiles of a work item: one or, with PAIRS, the last and the first of those left."""
    count = 1
    if PAIRS:
        num_tiles = sizes[0]
        items = (num_tiles + 1) // 2
        count = gl.where(item % items == num_tiles // 2, 1, 2)  # the one in the middle is alone
    return count


@gluon.jit
def _query_tile(
    item, part, sizes, CAUSAL: gl.constexpr, PAIRS: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """(batch, head, first query, key tiles) of a part of a work item; it has at least one key tile.

    Items of a head are neighbours, so that they share K and V in L2. With CAUSAL the tiles with the
    most keys are first; pairs have the same number of keys.
    """
    num_tiles, num_heads, seqlen_q, seqlen_k, offset = sizes
    items = num_tiles
    if PAIRS:
        items = (num_tiles + 1) // 2
    tile = item % items
    head = item // items
    end = seqlen_k
    if CAUSAL:
        if PAIRS:
            tile = gl.where(part == 0, num_tiles - 1 - tile, tile)
        else:
            tile = num_tiles - 1 - tile
        end = gl.minimum(end, gl.minimum((tile + 1) * BLOCK_M, seqlen_q) + offset)
    steps = gl.maximum(gl.cdiv(end, BLOCK_N), 1)
    return head // num_heads, head % num_heads, tile * BLOCK_M, steps


@gluon.jit
def _copy_tile(desc, batch, head, row, ring, full, empty, step, STAGES: gl.constexpr):
    """Copy rows of a head into the slot of this step, once all consumers have left it."""
    slot = step % STAGES
    turn = step // STAGES & 1
    # A barrier counts as having completed a phase 1 before its first, so this passes at once for
    # the first STAGES steps.
    mbarrier.wait(empty.index(slot), turn ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tile = ring.index(slot).reshape(desc.block_type.shape)
    load_tile(desc, [batch, head, row, 0], full.index(slot), tile)


@gluon.jit
def _produce(
    descs, q_smem, q_full, q_empty, rings, sizes, num_items,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, PAIRS: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """For each query tile copy the queries of all consumers, then the tiles of K and V."""
    q_desc, k_desc, v_desc = descs
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    ROWS: gl.constexpr = q_smem.shape[1]
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    tiles = 0  # that were copied, of queries, and of keys
    done = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        for part in range(_count_tiles(item, sizes, PAIRS)):
            batch, head, first_query, steps = _query_tile(
                item, part, sizes, CAUSAL, PAIRS, BLOCK_M, BLOCK_N
            )
            mbarrier.wait(q_empty, (tiles & 1) ^ 1)
            mbarrier.expect(q_full, CONSUMERS * q_desc.block_type.nbytes)
            for who in gl.static_range(CONSUMERS):
                tile = q_smem.index(who).reshape(q_desc.block_type.shape)
                row = first_query + who * ROWS
                load_tile(q_desc, [batch, head, row, 0], q_full, tile)
            kv_head = head // GROUP
            _copy_tile(k_desc, batch, kv_head, 0, k_ring, k_full, k_empty, done, STAGES)
            for step in range(1, steps):
                row = step * BLOCK_N
                now = done + step
                _copy_tile(k_desc, batch, kv_head, row, k_ring, k_full, k_empty, now, STAGES)
                row -= BLOCK_N
                _copy_tile(v_desc, batch, kv_head, row, v_ring, v_full, v_empty, now - 1, STAGES)
            row = (steps - 1) * BLOCK_N
            done += steps
            _copy_tile(v_desc, batch, kv_head, row, v_ring, v_full, v_empty, done - 1, STAGES)
            tiles += 1


@gluon.jit
def _mask(s, queries, first_key, seqlen_k, CAUSAL: gl.constexpr):
    """-inf for the scores s [M, N] of keys that are not there or, with CAUSAL, come later."""
    layout: gl.constexpr = s.type.layout
    keys = first_key + gl.arange(0, s.shape[1], layout=gl.SliceLayout(0, layout))
    if CAUSAL:
        end = gl.minimum(queries + 1, seqlen_k)
        seen = keys[None, :] < end[:, None]
    else:
        seen = (keys < seqlen_k)[None, :]
    return gl.where(seen, s, float("-inf"))


@gluon.jit
def _online_softmax(s, m_i, l_i, scale):
    """(p, alpha, m, l): fold a tile of s [M, N] = q.k into the running maximum and sum, base 2."""
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    p = gl.exp2(gl.fma(s, scale, -m_new[:, None]))
    alpha = gl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)


@gluon.jit
def _step(
    acc, p, m_i, l_i, q, rings, mine, other, done, turned, step, full, queries, seqlen_k, scale,
    CAUSAL: gl.constexpr, TURNS: gl.constexpr, WHO: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """q k^T of this step beside p v of the step before; then p of this step."""
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    now = done + step
    slot = now % STAGES
    turn = now // STAGES & 1
    v_slot = (now - 1) % STAGES
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    ROWS: gl.constexpr = q.shape[0]
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout)
    mbarrier.wait(k_full.index(slot), turn)
    if TURNS:
        # Consumer 0 begins; it waits for the phase before that of the others.
        BEGINS: gl.constexpr = 1 if WHO == 0 else 0
        mbarrier.wait(mine, (turned + step - 1 + BEGINS) & 1)
    s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, v_ring.index(v_slot), acc, is_async=True)
    if TURNS:
        mbarrier.arrive(other)
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(k_empty.index(slot))
    if step >= full:  # a branch that full tiles jump over
        s = _mask(s, queries, step * BLOCK_N, seqlen_k, CAUSAL)
    p_new, alpha, m_i, l_i = _online_softmax(s, m_i, l_i, scale)
    p_new = gl.convert_layout(p_new.to(p.dtype), p.type.layout)
    # The tile of p_new. To wait for it here keeps ptxas from moving the next wait before the
    # softmax, which has to run beside the product.
    mbarrier.wait(v_full.index(slot), turn)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(v_slot))
    o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.convert_layout(alpha, o_rows)[:, None], p_new, m_i, l_i


@gluon.jit
def _attend(
    q, q_full, q_empty, rings, mine, other, tiles, done, turned, steps, first_query, sizes, scale,
    WHO: gl.constexpr, CAUSAL: gl.constexpr, TURNS: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """(acc, m, l) of the 64 queries in q.

    tiles, done and turned count what came before: query tiles, key tiles and turns.
    """
    k_ring, v_ring, k_full, k_empty, v_full, v_empty = rings
    _, _, _, seqlen_k, offset = sizes
    ROWS: gl.constexpr = q.shape[0]
    HEAD_DIM: gl.constexpr = q.shape[1]
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    # Queries as the keys they stand at: a causal query sees the keys up to its own.
    queries = first_query + offset + gl.arange(0, ROWS, layout=s_rows)
    # Steps before the first one that needs a mask.
    seen_by_all = seqlen_k
    if CAUSAL:
        seen_by_all = gl.maximum(gl.minimum(first_query + offset + 1, seqlen_k), 0)
    full = seen_by_all // BLOCK_N
    m_i = gl.full([ROWS], -LARGE, gl.float32, layout=s_rows)
    l_i = gl.zeros([ROWS], gl.float32, layout=s_rows)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=o_layout)

    slot = done % STAGES
    turn = done // STAGES & 1
    mbarrier.wait(q_full, tiles & 1)
    mbarrier.wait(k_full.index(slot), turn)
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout)
    s = warpgroup_mma(q, k_ring.index(slot).permute((1, 0)), s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot))
    s = _mask(s, queries, 0, seqlen_k, CAUSAL)
    p, alpha, m_i, l_i = _online_softmax(s, m_i, l_i, scale)
    p = gl.convert_layout(p.to(q.dtype), p_layout)
    mbarrier.wait(v_full.index(slot), turn)
    for step in range(1, steps):
        acc, p, m_i, l_i = _step(
            acc, p, m_i, l_i, q, rings, mine, other, done, turned, step, full, queries, seqlen_k,
            scale, CAUSAL, TURNS, WHO, BLOCK_N, STAGES,
        )  # fmt: skip
    mbarrier.arrive(q_empty)
    slot = (done + steps - 1) % STAGES
    acc = warpgroup_mma(p, v_ring.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(slot))
    return acc, m_i, l_i


@gluon.jit
def _consume(
    q_smem, o_smem, q_full, q_empty, rings, turns, outputs, sizes, num_items, scale,
    WHO: gl.constexpr, CAUSAL: gl.constexpr, PAIRS: gl.constexpr, TURNS: gl.constexpr,
    CONSUMERS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Attention of 64 queries of each query tile: those of consumer WHO."""
    o_ptr, lse_ptr, stride_ob, stride_oh, stride_on = outputs
    _, num_heads, seqlen_q, _, offset = sizes
    ROWS: gl.constexpr = q_smem.shape[1]
    HEAD_DIM: gl.constexpr = q_smem.shape[2]
    BLOCK_M: gl.constexpr = ROWS * CONSUMERS
    COLUMNS: gl.constexpr = HEAD_DIM // 8
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // COLUMNS, COLUMNS], [4, 1], [1, 0])
    mine = turns.index(WHO)
    other = turns.index((WHO + 1) % CONSUMERS)
    tiles = 0
    done = 0
    turned = 0
    for item in range(gl.program_id(0), num_items, gl.num_programs(0)):
        for part in range(_count_tiles(item, sizes, PAIRS)):
            batch, head, first_query, steps = _query_tile(
                item, part, sizes, CAUSAL, PAIRS, BLOCK_M, BLOCK_N
            )
            first_query += WHO * ROWS
            acc, m_i, l_i = _attend(
                q_smem.index(WHO), q_full, q_empty, rings, mine, other, tiles, done, turned,
                steps, first_query, sizes, scale, WHO, CAUSAL, TURNS, BLOCK_N, STAGES,
            )  # fmt: skip
            tiles += 1
            done += steps
            turned += steps - 1

            empty = l_i == 0.0
            factor = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, l_i))
            lse = (m_i + gl.log2(l_i)) * 0.6931471805599453
            lse = gl.where((m_i > -LARGE) & (m_i < LARGE), lse, float("nan"))
            rows = first_query + gl.arange(0, ROWS, layout=l_i.type.layout)
            if CAUSAL:
                lse = gl.where(rows + offset >= 0, lse, float("-inf"))
            at = (gl.cast(batch, gl.int64) * num_heads + head) * seqlen_q
            gl.store(lse_ptr + at + rows, lse, mask=rows < seqlen_q)

            # Through shared memory, for stores of 16 bytes.
            o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
            o = acc * gl.convert_layout(factor, o_rows)[:, None]
            o_smem.index(WHO).store(o.to(q_smem.dtype))
            o = o_smem.index(WHO).load(wide)
            rows = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
            columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide))
            at = gl.cast(batch, gl.int64) * stride_ob + gl.cast(head, gl.int64) * stride_oh
            offsets = (rows.to(gl.int64) * stride_on)[:, None] + columns[None, :]
            gl.store(o_ptr + at + offsets, o, mask=(rows < seqlen_q)[:, None])


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, stride_ob, stride_oh, stride_on,
    num_items, num_tiles, num_heads, seqlen_q, seqlen_k, offset, scale,
    GROUP: gl.constexpr, CAUSAL: gl.constexpr, PAIRS: gl.constexpr, TURNS: gl.constexpr,
    CONSUMERS: gl.constexpr, ROWS: gl.constexpr, HEAD_DIM: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    single: gl.constexpr = mbarrier.MBarrierLayout()
    q_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], tile)
    o_smem = gl.allocate_shared_memory(dtype, [CONSUMERS, ROWS, HEAD_DIM], tile)
    k_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile)
    v_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, HEAD_DIM], tile)
    q_full = gl.allocate_shared_memory(gl.int64, [1], single)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], single)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], single)
    turns = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], single)
    mbarrier.init(q_full, count=1)
    mbarrier.init(q_empty, count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=CONSUMERS)
        mbarrier.init(v_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(turns.index(i), count=1)
    fence_async_shared()

    rings = (k_ring, v_ring, k_full, k_empty, v_full, v_empty)
    outputs = (o_ptr, lse_ptr, stride_ob, stride_oh, stride_on)
    sizes = (num_tiles, num_heads, seqlen_q, seqlen_k, offset)
    descs = (q_desc, k_desc, v_desc)
    # A warp group's registers for each thread. Consumer 0 gets what the others leave of 65,536, and
    # that is as many as another consumer has.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        q_smem, o_smem, q_full, q_empty, rings, turns, outputs, sizes, num_items,
                        scale, 0, CAUSAL, PAIRS, TURNS, CONSUMERS, BLOCK_N, STAGES,
                    ),
                ),  # fmt: skip
                (
                    _consume,
                    (
                        q_smem, o_smem, q_full, q_empty, rings, turns, outputs, sizes, num_items,
                        scale, 1, CAUSAL, PAIRS, TURNS, CONSUMERS, BLOCK_N, STAGES,
                    ),
                ),  # fmt: skip
                (
                    _produce,
                    (
                    descs, q_smem, q_full, q_empty, rings, sizes, num_items,
                    GROUP, CAUSAL, PAIRS, CONSUMERS, BLOCK_N, STAGES,
                ),
                ),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (
                    _consume,
                    (
                        q_smem, o_smem, q_full, q_empty, rings, turns, outputs, sizes, num_items,
                        scale, 0, CAUSAL, PAIRS, TURNS, CONSUMERS, BLOCK_N, STAGES,
                    ),
                ),  # fmt: skip
                (
                    _consume,
                    (
                        q_smem, o_smem, q_full, q_empty, rings, turns, outputs, sizes, num_items,
                        scale, 1, CAUSAL, PAIRS, TURNS, CONSUMERS, BLOCK_N, STAGES,
                    ),
                ),  # fmt: skip
                (
                    _consume,
                    (
                        q_smem, o_smem, q_full, q_empty, rings, turns, outputs, sizes, num_items,
                        scale, 2, CAUSAL, PAIRS, TURNS, CONSUMERS, BLOCK_N, STAGES,
                    ),
                ),  # fmt: skip
                (
                    _produce,
                    (
                    descs, q_smem, q_full, q_empty, rings, sizes, num_items,
                    GROUP, CAUSAL, PAIRS, CONSUMERS, BLOCK_N, STAGES,
                ),
                ),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
