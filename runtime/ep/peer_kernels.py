"""Triton kernels of the exchange over peer memory (:mod:`eplb.runtime.ep.peer_exchange`).

Rows go straight from a token's activations into a peer's memory, and results straight from the
experts' outputs into the memory of the token's own process. A process says by a number in each
peer's memory that what it had to write is written, and waits for theirs.
Order is by CUDA's memory model: stores of earlier kernels of the stream come before the release of
the number, system-wide, and a peer's loads after its acquire.
Shape letters: T tokens, K top-k, C processes, P parts, S slots of a process, N rows from a process,
B bytes, H hidden size.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["add_up", "arrive", "dispatch", "give_back", "meet"]

# No fault: the largest int64, above every process' number.
NO_FAULT = tl.constexpr((1 << 63) - 1)


@triton.jit  # type: ignore[untyped-decorator]
def dispatch(  # type: ignore[no-untyped-def]
    tokens, slots, weights, index, targets, counters, rows_at, num_tokens, token_stride,
    slot_stride, weight_stride, row_bytes, meta_bytes, first_slot, slots_per_part, num_parts,
    parts_per_process, num_processes, width, num_returns, top_k, K: tl.constexpr,
    most: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write every token once to each part that it needs, and count.

    ``counters``: rows to each process [C], rows to each part [P], pairs of each slot [C * S].
    ``index`` [T, J]: where the token's results will be, -1 behind them.
    """
    place = tl.arange(0, K)
    there = place < top_k
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        slot = tl.load(slots + token * slot_stride + place, mask=there, other=-1)
        weight = tl.load(weights + token * weight_stride + place, mask=there, other=0.0)
        routed = slot >= 0
        local = (slot - first_slot).to(tl.int32)
        part = tl.where(routed, local // slots_per_part, num_parts)
        process = part // parts_per_process
        same = part[:, None] == part[None, :]
        earlier = place[None, :] < place[:, None]
        first = routed & (tl.sum((same & earlier).to(tl.int32), axis=1) == 0)
        # Results are added up in order of parts.
        lower = first[None, :] & (part[None, :] < part[:, None])
        back = token * num_returns + tl.sum(lower.to(tl.int32), axis=1)
        number = tl.sum(first.to(tl.int32))
        returned = tl.where(place < number, token * num_returns + place, -1)
        tl.store(index + token * num_returns + place, returned, mask=place < num_returns)
        of_slot = counters + num_processes + num_parts + local
        tl.atomic_add(of_slot, 1, mask=routed, sem="relaxed")
        tl.atomic_add(counters + num_processes + part, 1, mask=first, sem="relaxed")
        row = tl.atomic_add(counters + process, 1, mask=first, sem="relaxed").to(tl.int64)
        target = tl.load(rows_at + process, mask=first, other=0) + row * row_bytes
        target = tl.where(first, target, 0)
        tl.store(targets + token * K + place, target)
        # Behind the activations: slots of the part, weights, and where the result goes.
        meta = (target + meta_bytes).to(tl.pointer_type(tl.int32))
        in_process = local - process * (slots_per_part * parts_per_process)
        kept = tl.where(same & routed[None, :], in_process[None, :], -1)
        sent = first[:, None] & there[None, :]
        tl.store(meta[:, None] + place[None, :], kept, mask=sent)
        bits = tl.broadcast_to(weight.to(tl.int32, bitcast=True)[None, :], (K, K))
        tl.store(meta[:, None] + top_k + place[None, :], bits, mask=sent)
        tl.store(meta + 2 * top_k, back, mask=first)
        # What some threads stored all of them load.
        tl.debug_barrier()
        # Offsets beyond 32 bits.
        activations = tokens + (tl.full((), 0, tl.int64) + token) * token_stride
        for begin in range(0, width, columns):
            column = begin + tl.arange(0, columns)
            value = tl.load(activations + column, mask=column < width)
            for k in tl.static_range(most):
                at = tl.load(targets + token * K + k)
                out = at.to(tl.pointer_type(tokens.dtype.element_ty)) + column
                out = tl.multiple_of(out, 16)
                tl.store(out, value, mask=(column < width) & (at != 0))


@triton.jit  # type: ignore[untyped-decorator]
def _signal_and_wait(  # type: ignore[no-untyped-def]
    flag_at, flags, epoch, abort, num_processes, C: tl.constexpr,
):  # fmt: skip
    """Tell all peers that this process has come so far, and wait until they have; or for abort."""
    lane = tl.arange(0, C)
    inside = lane < num_processes
    at = tl.load(flag_at + lane, mask=inside, other=0).to(tl.pointer_type(tl.int64))
    epochs = tl.zeros([C], tl.int64) + epoch
    tl.debug_barrier()
    tl.atomic_xchg(at, epochs, mask=inside, sem="release", scope="sys")
    late = tl.full((), 1, tl.int32)
    while late > 0:
        seen = tl.atomic_add(flags + lane, tl.zeros([C], tl.int64), mask=inside, sem="acquire",
                             scope="sys")  # fmt: skip
        late = tl.sum((inside & (seen < epoch)).to(tl.int32))
        if tl.load(abort, volatile=True) != 0:
            late = late * 0
    tl.debug_barrier()


@triton.jit  # type: ignore[untyped-decorator]
def meet(  # type: ignore[no-untyped-def]
    counters, words, header_at, headers, flag_at, flags, epoch_at, abort, told, rows_C, end_S,
    cursor_S, process, num_processes, num_parts, parts_per_process, slots_per_process,
    with_counts: tl.constexpr, C: tl.constexpr, Q: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """Meet all peers; with counts, exchange these, and find where each slot's pairs begin.

    A header: rows of each part [Q], pairs of each slot [S], two words. ``told`` is what the host
    reads: minimum of both words, all pairs, rows of each process, rows and pairs of each part.
    """
    epoch = tl.load(epoch_at) + 1
    part, slot = tl.arange(0, Q), tl.arange(0, S)
    is_part, is_slot = part < parts_per_process, slot < slots_per_process
    size = parts_per_process + slots_per_process + 2
    # A peer may still be reading what it was told last.
    side = (epoch % 2) * num_processes
    if with_counts:
        word, fault = tl.load(words), tl.load(words + 1)
        for c in range(num_processes):
            to = tl.load(header_at + c).to(tl.pointer_type(tl.int64)) + (side + process) * size
            of_part = counters + num_processes + c * parts_per_process + part
            of_slot = counters + num_processes + num_parts + c * slots_per_process + slot
            rows = tl.load(of_part, mask=is_part, other=0)
            pairs = tl.load(of_slot, mask=is_slot, other=0)
            tl.store(to + part, rows.to(tl.int64), mask=is_part)
            tl.store(to + parts_per_process + slot, pairs.to(tl.int64), mask=is_slot)
            tl.store(to + size - 2, word)
            tl.store(to + size - 1, fault)
            tl.debug_barrier()
            # For the next dispatch.
            tl.store(of_part, 0, mask=is_part)
            tl.store(of_slot, 0, mask=is_slot)
            tl.store(counters + c, 0)
    _signal_and_wait(flag_at, flags, epoch, abort, num_processes, C)
    tl.store(epoch_at, epoch)
    if with_counts:
        word_min = tl.full((), NO_FAULT, tl.int64)
        fault_min = tl.full((), NO_FAULT, tl.int64)
        rows_Q, pairs_S = tl.zeros([Q], tl.int64), tl.zeros([S], tl.int64)
        for c in range(num_processes):
            of = headers + (side + c) * size
            rows = tl.load(of + part, mask=is_part, other=0, volatile=True)
            rows_Q += rows
            pairs_S += tl.load(of + parts_per_process + slot, mask=is_slot, other=0, volatile=True)
            word_min = tl.minimum(word_min, tl.load(of + size - 2, volatile=True))
            fault_min = tl.minimum(fault_min, tl.load(of + size - 1, volatile=True))
            tl.store(rows_C + c, tl.sum(rows).to(tl.int32))
            tl.store(told + 3 + c, tl.sum(rows))
        end = tl.cumsum(pairs_S, axis=0)
        tl.store(end_S + slot, end.to(tl.int32), mask=is_slot)
        tl.store(cursor_S + slot, (end - pairs_S).to(tl.int32), mask=is_slot)
        tl.store(told, word_min)
        tl.store(told + 1, fault_min)
        tl.store(told + 2, tl.sum(pairs_S))
        tl.store(told + 3 + num_processes + part, rows_Q, mask=is_part)
        slots_per_part = slots_per_process // parts_per_process
        for q in range(parts_per_process):
            own = tl.sum(tl.where(slot // slots_per_part == q, pairs_S, 0))
            tl.store(told + 3 + num_processes + parts_per_process + q, own)


@triton.jit  # type: ignore[untyped-decorator]
def add_up(  # type: ignore[no-untyped-def]
    count_E, experts_at, experts, flag_at, flags, epoch_at, abort, process, num_processes,
    num_experts, C: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """Replace counts of experts by their sum over all processes."""
    epoch = tl.load(epoch_at) + 1
    expert = tl.arange(0, E)
    inside = expert < num_experts
    side = (epoch % 2) * num_processes
    own = tl.load(count_E + expert, mask=inside, other=0)
    for c in range(num_processes):
        to = tl.load(experts_at + c).to(tl.pointer_type(tl.int64)) + (side + process) * num_experts
        tl.store(to + expert, own, mask=inside)
    _signal_and_wait(flag_at, flags, epoch, abort, num_processes, C)
    tl.store(epoch_at, epoch)
    total = tl.zeros([E], tl.int64)
    for c in range(num_processes):
        of = experts + (side + c) * num_experts + expert
        total += tl.load(of, mask=inside, other=0, volatile=True)
    tl.store(count_E + expert, total, mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def arrive(  # type: ignore[no-untyped-def]
    rows, scales, meta, rows_C, cursor_S, index, out, most_rows, row_words, row_scales, row_metas,
    width, top_k, blocks, K: tl.constexpr, most: tl.constexpr, columns: tl.constexpr,
    scaled: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Write received rows to a place for each of their slots, pairs of a slot side by side.

    ``index`` [C, N, K] gets the places, -1 for none. Scaled rows are FP8 and are multiplied out.
    """
    source = tl.program_id(1)
    number = tl.load(rows_C + source)
    place = tl.arange(0, K)
    for n in range(tl.program_id(0), number, tl.num_programs(0)):
        row = source.to(tl.int64) * most_rows + n
        slot = tl.load(meta + row * row_metas + place, mask=place < top_k, other=-1)
        pair = tl.atomic_add(cursor_S + slot, 1, mask=slot >= 0, sem="relaxed")
        tl.store(index + row * K + place, tl.where(slot >= 0, pair, -1))
        # What some threads stored all of them load.
        tl.debug_barrier()
        for begin in range(0, width, columns):
            if scaled:
                number_of = begin // block + tl.arange(0, columns // block)
                column = number_of[:, None] * block + tl.arange(0, block)[None, :]
                inside = column < width
                value = tl.load(rows + row * row_words + column, mask=inside, other=0.0)
                scale = tl.load(scales + row * row_scales + number_of, mask=number_of < blocks,
                                other=0.0)  # fmt: skip
                value = (value.to(tl.float32) * scale[:, None]).to(out.dtype.element_ty)
            else:
                column = begin + tl.arange(0, columns)
                inside = column < width
                value = tl.load(rows + row * row_words + column, mask=inside)
            for k in tl.static_range(most):
                at = tl.load(index + row * K + k).to(tl.int64)
                tl.store(out + at * width + column, value, mask=inside & (at >= 0))


@triton.jit  # type: ignore[untyped-decorator]
def give_back(  # type: ignore[no-untyped-def]
    outputs, meta, weights, rows_C, index, back_at, most_rows, row_metas, hidden, top_k,
    K: tl.constexpr, most: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """Write the weighted sum of each received row's outputs to where its process wants it."""
    source = tl.program_id(1)
    number = tl.load(rows_C + source)
    back = tl.load(back_at + source).to(tl.pointer_type(outputs.dtype.element_ty))
    for n in range(tl.program_id(0), number, tl.num_programs(0)):
        row = source.to(tl.int64) * most_rows + n
        to = tl.load(meta + row * row_metas + 2 * top_k).to(tl.int64)
        for begin in range(0, hidden, columns):
            column = begin + tl.arange(0, columns)
            inside = column < hidden
            total = tl.zeros([columns], dtype=tl.float32)
            for k in tl.static_range(most):
                at = tl.load(index + row * K + k).to(tl.int64)
                weight = tl.load(weights + row * row_metas + top_k + k)
                # Most rows have few pairs: a branch costs less than loads of nothing.
                if at >= 0:
                    value = tl.load(outputs + at * hidden + column, mask=inside, other=0.0)
                    total += value.to(tl.float32) * weight
            tl.store(back + to * hidden + column, total.to(outputs.dtype.element_ty), mask=inside)
