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

from .forward_gluon_records import Descriptors, Done, GluonSizes, Memory, Outputs
from .score import LARGE

# Triton 3.9 calls this async_load.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
NOT_SPECIALIZED = [
    "num_items", "num_tiles", "num_heads", "seqlen_q", "seqlen_k", "offset",
]  # fmt: skip


@gluon.jit
def _count_tiles(item, sizes, form: gl.constexpr):
    """Returns the query tiles of a work item: 1, or with PAIRS a last and a first one of a head."""
    count = 1
    if form.PAIRS:
        items = (sizes.num_tiles + 1) // 2
        middle = item % items == sizes.num_tiles // 2  # which is alone
        count = gl.where(middle, 1, 2)
    return count


@gluon.jit
def _query_tile(item, part, sizes, form: gl.constexpr):
    """Returns (batch, head, first query, key tiles) of a part of a work item; key tiles >= 1.

    Items of a head are neighbours, so that they share K and V in L2. With CAUSAL the tiles with the
    most keys are first; pairs have the same number of keys.
    """
    BLOCK_M: gl.constexpr = form.ROWS * form.CONSUMERS
    items = sizes.num_tiles
    if form.PAIRS:
        items = (sizes.num_tiles + 1) // 2
    tile = item % items
    head = item // items
    end = sizes.seqlen_k
    if form.CAUSAL:
        if form.PAIRS:
            tile = gl.where(part == 0, sizes.num_tiles - 1 - tile, tile)
        else:
            tile = sizes.num_tiles - 1 - tile
        seen = gl.minimum((tile + 1) * BLOCK_M, sizes.seqlen_q) + sizes.offset
        end = gl.minimum(end, seen)
    steps = gl.maximum(gl.cdiv(end, form.BLOCK_N), 1)
    return head // sizes.num_heads, head % sizes.num_heads, tile * BLOCK_M, steps


@gluon.jit
def _copy_tile(desc, batch, head, row, ring, full, empty, step, STAGES: gl.constexpr):
    """Copies rows of a head into the slot of this step, once all consumers have left the slot."""
    slot = step % STAGES
    turn = step // STAGES & 1
    # A new barrier counts as past a phase 1, so the first STAGES steps do not wait here.
    mbarrier.wait(empty.index(slot), turn ^ 1)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    tile = ring.index(slot).reshape(desc.block_type.shape)
    load_tile(desc, [batch, head, row, 0], full.index(slot), tile)


@gluon.jit
def _copy_keys(descs, memory, batch, head, tile, step, form: gl.constexpr):
    """Copies a tile of K into its ring."""
    _copy_tile(
        descs.k, batch, head, tile * form.BLOCK_N, memory.k, memory.k_full, memory.k_empty, step,
        form.STAGES,
    )  # fmt: skip


@gluon.jit
def _copy_values(descs, memory, batch, head, tile, step, form: gl.constexpr):
    """Copies a tile of V into its ring."""
    _copy_tile(
        descs.v, batch, head, tile * form.BLOCK_N, memory.v, memory.v_full, memory.v_empty, step,
        form.STAGES,
    )  # fmt: skip


@gluon.jit
def _produce(descs, memory, sizes, form: gl.constexpr):
    """Copies for each query tile the queries of all consumers, then the tiles of K and V."""
    CONSUMERS: gl.constexpr = form.CONSUMERS
    tiles = 0  # that were copied, of queries, and of keys
    done = 0
    for item in range(gl.program_id(0), sizes.num_items, gl.num_programs(0)):
        for part in range(_count_tiles(item, sizes, form)):
            batch, head, first_query, steps = _query_tile(item, part, sizes, form)
            mbarrier.wait(memory.q_empty, (tiles & 1) ^ 1)
            mbarrier.expect(memory.q_full, CONSUMERS * descs.q.block_type.nbytes)
            for who in gl.static_range(CONSUMERS):
                tile = memory.q.index(who).reshape(descs.q.block_type.shape)
                row = first_query + who * form.ROWS
                load_tile(descs.q, [batch, head, row, 0], memory.q_full, tile)
            kv_head = head // form.GROUP
            _copy_keys(descs, memory, batch, kv_head, 0, done, form)
            for step in range(1, steps):
                _copy_keys(descs, memory, batch, kv_head, step, done + step, form)
                _copy_values(descs, memory, batch, kv_head, step - 1, done + step - 1, form)
            done += steps
            _copy_values(descs, memory, batch, kv_head, steps - 1, done - 1, form)
            tiles += 1


@gluon.jit
def _mask(s, queries, first_key, seqlen_k, CAUSAL: gl.constexpr):
    """Returns s [M, N], -inf for keys that are not there or, with CAUSAL, come later."""
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
    """Folds a tile of s [M, N] = q.k into the running maximum and sum; returns (p, alpha, m, l)."""
    m_new = gl.maximum(m_i, gl.max(s, 1) * scale)
    p = gl.exp2(gl.fma(s, scale, -m_new[:, None]))
    alpha = gl.exp2(m_i - m_new)
    return p, alpha, m_new, l_i * alpha + gl.sum(p, 1)


@gluon.jit
def _step(
    acc, p, m_i, l_i, q, memory, done, step, full, queries, seqlen_k, scale,
    WHO: gl.constexpr, form: gl.constexpr,
):  # fmt: skip
    """Computes q k^T of this step beside p v of the step before; then p of this step."""
    BLOCK_N: gl.constexpr = form.BLOCK_N
    ROWS: gl.constexpr = form.ROWS
    now = done.keys + step
    slot = now % form.STAGES
    turn = now // form.STAGES & 1
    v_slot = (now - 1) % form.STAGES
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout)
    mbarrier.wait(memory.k_full.index(slot), turn)
    if form.TURNS:
        # Consumer 0 begins; it waits for the phase before that of the others.
        BEGINS: gl.constexpr = 1 if WHO == 0 else 0
        mbarrier.wait(memory.turns.index(WHO), (done.turns + step - 1 + BEGINS) & 1)
    k = memory.k.index(slot).permute((1, 0))
    s = warpgroup_mma(q, k, s, use_acc=False, is_async=True)
    acc = warpgroup_mma(p, memory.v.index(v_slot), acc, is_async=True)
    if form.TURNS:
        mbarrier.arrive(memory.turns.index((WHO + 1) % form.CONSUMERS))
    s = warpgroup_mma_wait(1, deps=[s])
    mbarrier.arrive(memory.k_empty.index(slot))
    if step >= full:  # a branch that full tiles jump over
        s = _mask(s, queries, step * BLOCK_N, seqlen_k, form.CAUSAL)
    p_new, alpha, m_i, l_i = _online_softmax(s, m_i, l_i, scale)
    p_new = gl.convert_layout(p_new.to(p.dtype), p.type.layout)
    # Waits for the V that p_new multiplies. A wait in this place keeps ptxas from moving the next
    # one before the softmax, which has to run beside the product.
    mbarrier.wait(memory.v_full.index(slot), turn)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(memory.v_empty.index(v_slot))
    o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return acc * gl.convert_layout(alpha, o_rows)[:, None], p_new, m_i, l_i


@gluon.jit
def _attend(memory, done, steps, first_query, sizes, scale, WHO: gl.constexpr, form: gl.constexpr):
    """Returns (acc, m, l) of the 64 queries of consumer WHO."""
    BLOCK_N: gl.constexpr = form.BLOCK_N
    ROWS: gl.constexpr = form.ROWS
    HEAD_DIM: gl.constexpr = form.HEAD_DIM
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    q = memory.q.index(WHO)
    seqlen_k = sizes.seqlen_k
    # The key at which each query stands: a causal query sees the keys up to that one.
    queries = first_query + sizes.offset + gl.arange(0, ROWS, layout=s_rows)
    # The number of steps before the first one that needs a mask.
    seen_by_all = seqlen_k
    if form.CAUSAL:
        seen_by_all = gl.maximum(gl.minimum(first_query + sizes.offset + 1, seqlen_k), 0)
    full = seen_by_all // BLOCK_N
    m_i = gl.full([ROWS], -LARGE, gl.float32, layout=s_rows)
    l_i = gl.zeros([ROWS], gl.float32, layout=s_rows)
    acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, layout=o_layout)

    slot = done.keys % form.STAGES
    turn = done.keys // form.STAGES & 1
    mbarrier.wait(memory.q_full, done.queries & 1)
    mbarrier.wait(memory.k_full.index(slot), turn)
    s = gl.zeros([ROWS, BLOCK_N], gl.float32, layout=s_layout)
    k = memory.k.index(slot).permute((1, 0))
    s = warpgroup_mma(q, k, s, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(memory.k_empty.index(slot))
    s = _mask(s, queries, 0, seqlen_k, form.CAUSAL)
    p, alpha, m_i, l_i = _online_softmax(s, m_i, l_i, scale)
    p = gl.convert_layout(p.to(q.dtype), p_layout)
    mbarrier.wait(memory.v_full.index(slot), turn)
    for step in range(1, steps):
        acc, p, m_i, l_i = _step(
            acc, p, m_i, l_i, q, memory, done, step, full, queries, seqlen_k, scale, WHO, form
        )
    mbarrier.arrive(memory.q_empty)
    slot = (done.keys + steps - 1) % form.STAGES
    acc = warpgroup_mma(p, memory.v.index(slot), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(memory.v_empty.index(slot))
    return acc, m_i, l_i


@gluon.jit
def _consume(memory, outputs, sizes, scale, WHO: gl.constexpr, form: gl.constexpr):
    """Computes the attention of 64 queries of each query tile: those of consumer WHO."""
    ROWS: gl.constexpr = form.ROWS
    HEAD_DIM: gl.constexpr = form.HEAD_DIM
    COLUMNS: gl.constexpr = HEAD_DIM // 8
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [32 // COLUMNS, COLUMNS], [4, 1], [1, 0])
    strides = outputs.strides
    seqlen_q = sizes.seqlen_q
    tiles = 0
    done = 0
    turned = 0
    for item in range(gl.program_id(0), sizes.num_items, gl.num_programs(0)):
        for part in range(_count_tiles(item, sizes, form)):
            batch, head, first_query, steps = _query_tile(item, part, sizes, form)
            first_query += WHO * ROWS
            before = Done(tiles, done, turned)
            acc, m_i, l_i = _attend(memory, before, steps, first_query, sizes, scale, WHO, form)
            tiles += 1
            done += steps
            turned += steps - 1

            empty = l_i == 0.0
            factor = gl.where(empty, 0.0, 1.0 / gl.where(empty, 1.0, l_i))
            lse = (m_i + gl.log2(l_i)) * 0.6931471805599453
            lse = gl.where((m_i > -LARGE) & (m_i < LARGE), lse, float("nan"))
            rows = first_query + gl.arange(0, ROWS, layout=l_i.type.layout)
            if form.CAUSAL:
                lse = gl.where(rows + sizes.offset >= 0, lse, float("-inf"))
            at = (gl.cast(batch, gl.int64) * sizes.num_heads + head) * seqlen_q
            gl.store(outputs.lse_ptr + at + rows, lse, mask=rows < seqlen_q)

            # o goes through shared memory, for stores of 16 bytes.
            o_rows: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
            o = acc * gl.convert_layout(factor, o_rows)[:, None]
            memory.o.index(WHO).store(o.to(memory.q.dtype))
            o = memory.o.index(WHO).load(wide)
            rows = first_query + gl.arange(0, ROWS, layout=gl.SliceLayout(1, wide))
            columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, wide))
            at = gl.cast(batch, gl.int64) * strides.b + gl.cast(head, gl.int64) * strides.h
            offsets = (rows.to(gl.int64) * strides.n)[:, None] + columns[None, :]
            gl.store(outputs.o_ptr + at + offsets, o, mask=(rows < seqlen_q)[:, None])


@gluon.jit(do_not_specialize=NOT_SPECIALIZED)
def forward_kernel(
    q_desc, k_desc, v_desc, o_ptr, lse_ptr, o_strides,
    num_items, num_tiles, num_heads, seqlen_q, seqlen_k, offset, scale, form: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    CONSUMERS: gl.constexpr = form.CONSUMERS
    ROWS: gl.constexpr = form.ROWS
    HEAD_DIM: gl.constexpr = form.HEAD_DIM
    BLOCK_N: gl.constexpr = form.BLOCK_N
    STAGES: gl.constexpr = form.STAGES
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

    memory = Memory(
        q_smem, o_smem, q_full, q_empty, k_ring, v_ring, k_full, k_empty, v_full, v_empty, turns
    )
    outputs = Outputs(o_ptr, lse_ptr, o_strides)
    sizes = GluonSizes(num_items, num_tiles, num_heads, seqlen_q, seqlen_k, offset)
    descs = Descriptors(q_desc, k_desc, v_desc)
    # The last list holds the registers of a thread, by warp group. Consumer 0 gets what the others
    # leave of 65,536, which is as many as another consumer has.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (memory, outputs, sizes, scale, 0, form)),
                (_consume, (memory, outputs, sizes, scale, 1, form)),
                (_produce, (descs, memory, sizes, form)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.static_assert(CONSUMERS == 3)
        gl.warp_specialize(
            [
                (_consume, (memory, outputs, sizes, scale, 0, form)),
                (_consume, (memory, outputs, sizes, scale, 1, form)),
                (_consume, (memory, outputs, sizes, scale, 2, form)),
                (_produce, (descs, memory, sizes, form)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
