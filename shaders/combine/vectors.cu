// combine of bf16 rows that are weighted already, eight columns a thread: see slots.wgsl. The reads of some slots are under
// way together, whether they count or not.
// out bf16 [tokens, HIDDEN_SIZE]. Twin: src/kernels/combine.rs

constexpr unsigned VECS = HIDDEN_SIZE / 8;
constexpr unsigned TOGETHER = TOP_K < 8 ? TOP_K : 8;

KERNEL {
    WAIT;
    const unsigned count = token_count() * VECS;
    for (unsigned at = blockIdx.x * THREADS + threadIdx.x; at < count; at += gridDim.x * THREADS) {
        const unsigned token = at / VECS, first = at % VECS * 8;
        float sums[8] = {};
        int previous = -1;
        for (unsigned begin = 0; begin < TOP_K; begin += TOGETHER) {
            unsigned slots[TOGETHER];
            int chosen[TOGETHER];
            uint4 rows[TOGETHER];
#pragma unroll
            for (unsigned step = 0; step < TOGETHER; step++) {
                if (begin + step < TOP_K) {
                    previous = next_slot(token * TOP_K, previous);
                    slots[step] = token * TOP_K + unsigned(previous);
                    chosen[step] = row_slots_[slots[step]];
                    rows[step] = reinterpret_cast<const uint4*>(expert_out_)[size_t(slots[step]) * VECS + first / 8];
                }
            }
#pragma unroll
            for (unsigned step = 0; step < TOGETHER; step++) {
                if (begin + step < TOP_K && chosen[step] >= 0 && chosen[step] < int(NUM_SLOTS)) {
                    const float weight = output_weight(slots[step]);
                    const unsigned words[4] = {rows[step].x, rows[step].y, rows[step].z, rows[step].w};
#pragma unroll
                    for (unsigned col = 0; col < 8; col++) {
                        const unsigned bits = col % 2 == 0 ? words[col / 2] << 16 : words[col / 2] & 0xffff0000u;
                        sums[col] = round_step(sums[col] + weighted_row(weight, __uint_as_float(bits)));
                    }
                }
            }
        }
        const bool missed = is_missed(token);
        unsigned words[4] = {};
#pragma unroll
        for (unsigned col = 0; col < 8; col++) {
            const float routed = round_step(ROUTED_SCALING_FACTOR * sums[col]);
            const float total = join_shared(add_bias(routed, first + col), token, first + col);
            words[col / 2] |= encode(missed ? 0x7fc00000u : __float_as_uint(total)) << (16 * (col % 2));
        }
        reinterpret_cast<uint4*>(out_)[at] = make_uint4(words[0], words[1], words[2], words[3]);
    }
}
