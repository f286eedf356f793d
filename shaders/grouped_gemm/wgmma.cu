// grouped_gemm on the matrix units of warpgroups (compute capability 9.0):
// out[r, f] = finish(W[slot of r] rows[r / INPUT_DIVISOR]).
// One block: HEIGHT rows of a packed matrix and up to ROWS rows of a group, again and again; as many blocks as the device
// holds walk all of them. A warpgroup copies 128 bytes of each row at a time into a ring of stages, ahead of the two
// that multiply half of the matrix rows each, also while those finish. The weights are the operand of 64 rows, tokens
// that of ROWS. Weights of 4 bits are decoded from a stage into registers, the others are read there by the units themselves.
// Packed matrix: see span.wgsl. out: f32 or bf16 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs

// Tiles of 64 matrix rows that a warpgroup multiplies.
constexpr unsigned TALL = HEIGHT / (64 * MULTIPLIERS);
constexpr unsigned COPIERS = 128;
// Vectors of 16 bytes of a matrix row and of a row in a stage.
constexpr unsigned WEIGHT_VECS = WEIGHT_KIND == 2 ? 4 : 8;
constexpr unsigned INPUT_VECS = WEIGHT_KIND == 2 ? 16 : 8;
constexpr unsigned INPUT_VECS_PER_ROW = VECS_PER_ROW * (INPUT_VECS / WEIGHT_VECS);
constexpr unsigned STEPS = (VECS_PER_ROW + WEIGHT_VECS - 1) / WEIGHT_VECS;
constexpr unsigned WEIGHT_BYTES = HEIGHT * WEIGHT_VECS * 16;
constexpr unsigned PANEL_BYTES = ROWS * 128;
constexpr unsigned STAGE_BYTES = WEIGHT_BYTES + PANEL_BYTES * (INPUT_VECS / 8);
// A word of scales a matrix row; or a scale a row, and those of gate and up for each warpgroup.
constexpr unsigned SCALES = WEIGHT_KIND == 2 ? HEIGHT : ROWS + 8;
constexpr unsigned RING_BYTES = STAGES * (STAGE_BYTES + SCALES * 4);
// Products under way whose weights are in registers.
constexpr int IN_FLIGHT = ROWS <= 16 ? 3 : ROWS > 64 ? 2 : 1;
static_assert(STAGES >= 2 && STAGE_BYTES % 1024 == 0, "stages of whole panels");
// Results of bf16 leave by vectors: a warpgroup's, of 32 rows, in order. Rows of an odd width leave by values. Segments
// begin at multiples of 64 matrix rows.
constexpr bool IN_ORDER = STORE_BF16 && OUT_COLS % 8 == 0;
constexpr unsigned ORDER_COLS = 64 / FEATURE_ROWS, ORDER_STRIDE = ORDER_COLS * 2 + 16;
// Which rows a warpgroup's tile has, and their weights.
constexpr unsigned LIST_BEGIN = RING_BYTES + 16 * STAGES, LIST_BYTES = 8 * ROWS;
constexpr unsigned ORDER_BEGIN = LIST_BEGIN + MULTIPLIERS * LIST_BYTES;
static_assert(ORDER_BEGIN + (IN_ORDER ? MULTIPLIERS * 32 * ORDER_STRIDE : 0) + 1024 <= SHARED_BYTES,
    "the ring, its barriers, the lists, what is put in order, and where all may begin");
static_assert(RING_BYTES % 16 == 0, "vectors behind it");

static_assert(ROWS == 16 || ROWS == 32 || ROWS == 64 || ROWS == 160, "the widths of products below");

// Two pairs of bf16 from four codes of E2M1, the first of them low, times a power of two.
__device__ __forceinline__ void decode_four(unsigned codes, unsigned scale, unsigned& first, unsigned& second) {
    const unsigned which = codes & 0x7777u;
    unsigned high = __byte_perm(0x3f3f3f00u, 0x40404040u, which);
    const unsigned low = __byte_perm(0xc0800000u, 0xc0804000u, which);
    high |= __byte_perm(codes, codes << 4, 0x1504) & 0x80808080u;
    first = __byte_perm(low, high, 0x5140);
    second = __byte_perm(low, high, 0x7362);
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(first) : "r"(scale), "r"(0x80008000u));
    asm("fma.rn.bf16x2 %0, %0, %1, %2;" : "+r"(second) : "r"(scale), "r"(0x80008000u));
}

template <int VALUE> struct Int {
    static constexpr int value = VALUE;
};

KERNEL {
    extern __shared__ unsigned char memory[];
    unsigned skipped;
    const unsigned ring = ring_of(memory, skipped);
    const unsigned scales_begin = STAGES * STAGE_BYTES, full = ring + RING_BYTES, empty = full + 8 * STAGES;
    const unsigned thread = threadIdx.x % 128;
    // The compiler is to know that it is the same for all threads of a warp.
    const unsigned role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    // The warps that multiply.
    prepare_barriers(full, empty, STAGES, COPIERS, 4 * MULTIPLIERS);
    WAIT;
    Turn turn;
    const unsigned &stage = turn.stage, &parity = turn.parity;
    if (role == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COPIER_REGISTERS));
        constexpr unsigned WEIGHT_STEP = COPIERS / WEIGHT_VECS, INPUT_STEP = COPIERS / INPUT_VECS;
        constexpr unsigned WEIGHT_COPIES = HEIGHT / WEIGHT_STEP, INPUT_COPIES = (ROWS + INPUT_STEP - 1) / INPUT_STEP;
        const unsigned weight_vec = thread % WEIGHT_VECS, weight_row = thread / WEIGHT_VECS;
        const unsigned input_vec = thread % INPUT_VECS, input_row = thread / INPUT_VECS;
        // Vectors of a row stand exchanged, so that those of neighbouring rows lie in different banks.
        const unsigned weight_place = weight_row * WEIGHT_VECS * 16
            + (weight_vec ^ (WEIGHT_KIND == 2 ? weight_row / 2 % 4 : weight_row % 8)) * 16;
        const unsigned input_place =
            WEIGHT_BYTES + input_vec / 8 * PANEL_BYTES + input_row * 128 + (input_vec % 8 ^ input_row % 8) * 16;
        const auto visit = [&](const Tile& tile, const Span& span, unsigned first) {
            // What stands in the place of rows that are not there meets no row that is.
            const unsigned weights_there = span.row_end - first, inputs_there = tile.count;
            const uint4* const weights =
                segment_ + span.codes + size_t(first - span.row_begin + weight_row) * VECS_PER_ROW + weight_vec;
            unsigned input_rows[INPUT_COPIES];
            const auto row_of = [&](unsigned at) {
                return tile_row(tile, tile.first + min(at, tile.count - 1)) / INPUT_DIVISOR;
            };
#pragma unroll
            for (unsigned at = 0; at < INPUT_COPIES; at++) {
                input_rows[at] = row_of(input_row + at * INPUT_STEP) * INPUT_VECS_PER_ROW + input_vec;
            }
            const unsigned scaled_row = WEIGHT_KIND == 1 ? row_of(thread) : 0;
            for (unsigned step = 0; step < STEPS; step++) {
                wait_for(empty + 8 * stage, parity ^ 1);
                const unsigned place = ring + stage * STAGE_BYTES;
                const unsigned weight_bytes = step * WEIGHT_VECS + weight_vec < VECS_PER_ROW ? 16 : 0;
                const unsigned input_bytes = step * INPUT_VECS + input_vec < INPUT_VECS_PER_ROW ? 16 : 0;
#pragma unroll
                for (unsigned at = 0; at < WEIGHT_COPIES; at++) {
                    if (weight_row + at * WEIGHT_STEP < weights_there) {
                        const uint4* const from = weights + step * WEIGHT_VECS + at * WEIGHT_STEP * VECS_PER_ROW;
                        copy_vec(place + weight_place + at * WEIGHT_STEP * WEIGHT_VECS * 16, from, weight_bytes);
                    }
                }
#pragma unroll
                for (unsigned at = 0; at < INPUT_COPIES; at++) {
                    if (input_row + at * INPUT_STEP < inputs_there) {
                        const uint4* const from = rows_ + input_rows[at] + step * INPUT_VECS;
                        copy_vec(place + input_place + at * INPUT_STEP * 128, from, input_bytes);
                    }
                }
                const unsigned scale_place = ring + scales_begin + (stage * SCALES + thread) * 4;
#if WEIGHT_KIND == 2
                for (unsigned row = thread; row < min(HEIGHT, weights_there); row += COPIERS) {
                    const unsigned word = scale_row(span, first + row) + step;
                    copy_word(scale_place + (row - thread) * 4, reinterpret_cast<const unsigned*>(segment_) + word);
                }
#elif WEIGHT_KIND == 1
                if (thread < MULTIPLIERS * PAIR) {
                    const unsigned row = min(first + thread / PAIR * 64, span.row_end - PAIR) + thread % PAIR;
                    const unsigned word = scale_row(span, row) + block_of(span, row, step * 128);
                    copy_word(scale_place + ROWS * 4, reinterpret_cast<const unsigned*>(segment_) + word);
                }
                for (unsigned row = thread; row < tile.count; row += COPIERS) {
                    const unsigned group = min(step * 128 / INPUT_GROUP, INPUT_GROUPS - 1);
                    const unsigned scaled = row == thread ? scaled_row : row_of(row);
                    copy_word(scale_place + (row - thread) * 4, input_scales_ + group * INPUT_SCALE_COLUMN + scaled * INPUT_SCALE_ROW);
                }
#endif
                // Arrives when all that this thread has begun to copy is there.
                asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" :: "r"(full + 8 * stage) : "memory");
                turn.advance();
            }
        };
        EACH_UNIT(visit);
        asm volatile("cp.async.wait_all;" ::: "memory");
        return;
    }
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
    const unsigned lane = thread % 32, group = lane / 4, quarter = lane % 4;
    // Of the first of this thread's rows in a block, the other one is 8 behind it.
    const unsigned own_row = (role - 1) * 64 * TALL + thread / 32 * 16 + group;
    const unsigned char* const ring_memory = memory + skipped;
    const auto visit = [&](const Tile& tile, const Span& span, unsigned first) {
        const unsigned last = span.row_end - 1;
        // Asked for now, and needed when all is multiplied.
        constexpr unsigned LISTED = (ROWS + 127) / 128;
        unsigned listed_rows[LISTED];
        float listed_weights[LISTED];
#pragma unroll
        for (unsigned at = 0; at < LISTED; at++) {
            listed_rows[at] = tile_row(tile, tile.first + min(thread + 128 * at, tile.count - 1));
            listed_weights[at] = topk_weight(listed_rows[at]);
        }
        uint2* const list = reinterpret_cast<uint2*>(memory + skipped + LIST_BEGIN + (role - 1) * LIST_BYTES);
        const auto compute = [&](auto width) {
            constexpr int N = decltype(width)::value;
            float totals[TALL][N / 2] = {};
            const auto done = [&](unsigned of) {
                if (lane == 0) {
                    arrive(empty + 8 * of);
                }
            };
#if WEIGHT_KIND == 0
            unsigned before = STAGES;
            for (unsigned step = 0; step < STEPS; step++) {
                const unsigned place = ring + stage * STAGE_BYTES;
                const unsigned rows = panel_at(place + WEIGHT_BYTES);
                wait_for_copies(full + 8 * stage, parity);
                begin_products();
#pragma unroll
                for (unsigned tall = 0; tall < TALL; tall++) {
                    const unsigned weights = panel_at(place + ((role - 1) * TALL + tall) * 64 * 128);
#pragma unroll
                    for (unsigned at = 0; at < 4; at++) {
                        multiply<N>(totals[tall], weights + 2 * at, rows + 2 * at, step + at > 0);
                    }
                }
                commit_products();
                wait_products<1>();
                if (before < STAGES) {
                    done(before);
                }
                before = stage;
                turn.advance();
            }
            wait_products<0>();
            done(before);
#elif WEIGHT_KIND == 1
            static_assert(TALL == 1, "sums and totals of one tile fill the registers");
            const auto issue = [&](float (&sums)[N / 2]) {
                const unsigned place = ring + stage * STAGE_BYTES;
                const unsigned weights = panel_at(place + (role - 1) * 64 * 128), rows = panel_at(place + WEIGHT_BYTES);
                wait_for_copies(full + 8 * stage, parity);
                begin_products();
#pragma unroll
                for (unsigned at = 0; at < 4; at++) {
                    multiply<N>(sums, weights + 2 * at, rows + 2 * at, at > 0);
                }
                commit_products();
            };
            // One f32 sum a block of columns, scaled, then added.
            const auto promote = [&](float (&sums)[N / 2]) {
                pin(sums);
                const auto scales = reinterpret_cast<const float*>(ring_memory + scales_begin) + stage * SCALES;
                const float weight = scales[ROWS + (role - 1) * PAIR + group % PAIR];
#pragma unroll
                for (int at = 0; at < N / 2; at += 4) {
                    const float2 entering = *reinterpret_cast<const float2*>(scales + 2 * at + 2 * quarter);
                    const float left = weight * entering.x, right = weight * entering.y;
                    totals[0][at] += sums[at] * left;
                    totals[0][at + 1] += sums[at + 1] * right;
                    totals[0][at + 2] += sums[at + 2] * left;
                    totals[0][at + 3] += sums[at + 3] * right;
                }
            };
            for (unsigned step = 0; step < STEPS; step++) {
                float sums[N / 2];
                issue(sums);
                wait_products<0>();
                promote(sums);
                done(stage);
                turn.advance();
            }
#else
            unsigned before = STAGES;
            for (unsigned step = 0; step < STEPS; step++) {
                const unsigned place = ring + stage * STAGE_BYTES;
                wait_for_copies(full + 8 * stage, parity);
                const unsigned char* const staged = ring_memory + stage * STAGE_BYTES;
                const unsigned* const words = reinterpret_cast<const unsigned*>(ring_memory + scales_begin) + stage * SCALES + own_row;
                // Powers of two as pairs of bf16; 2^-127 is a subnormal.
                const auto power = [](unsigned scales, unsigned at) {
                    const unsigned exponent = scales >> (8 * at) & 0xffu;
                    return exponent == 0 ? 0x00400040u : exponent * 0x00800080u;
                };
                const unsigned take = quarter | (quarter + 4) << 4;
                const auto own_codes = [&](unsigned row, unsigned vec) {
                    const uint4 codes = *reinterpret_cast<const uint4*>(staged + row * 64 + (vec ^ row / 2 % 4) * 16);
                    return __byte_perm(__byte_perm(codes.x, codes.y, take), __byte_perm(codes.z, codes.w, take), 0x5410);
                };
#pragma unroll
                for (unsigned tall = 0; tall < TALL; tall++) {
                    const unsigned row = own_row + 64 * tall;
                    const unsigned low_scales = words[64 * tall], high_scales = words[64 * tall + 8];
#pragma unroll
                    for (unsigned vec = 0; vec < 4; vec++) {
                        // What registers there are hold the operands of so many products.
                        wait_products<IN_FLIGHT>();
                        if (tall * 4 + vec == IN_FLIGHT && before < STAGES) {
                            done(before);
                        }
                        const unsigned low = own_codes(row, vec), high = own_codes(row + 8, vec);
                        const unsigned low_scale = power(low_scales, vec), high_scale = power(high_scales, vec);
                        unsigned operands[2][4];
                        decode_four(low, low_scale, operands[0][0], operands[0][2]);
                        decode_four(high, high_scale, operands[0][1], operands[0][3]);
                        decode_four(low >> 16, low_scale, operands[1][0], operands[1][2]);
                        decode_four(high >> 16, high_scale, operands[1][1], operands[1][3]);
                        const unsigned rows = panel_at(place + WEIGHT_BYTES + vec / 2 * PANEL_BYTES) + vec % 2 * 4;
                        begin_products();
                        multiply<N>(totals[tall], operands[0], rows, step + vec > 0);
                        multiply<N>(totals[tall], operands[1], rows + 2, true);
                        commit_products();
                    }
                }
                before = stage;
                turn.advance();
            }
            wait_products<0>();
            done(before);
#endif
#pragma unroll
            for (unsigned at = 0; at < LISTED; at++) {
                if (thread + 128 * at < ROWS) {
                    list[thread + 128 * at] = make_uint2(listed_rows[at], __float_as_uint(listed_weights[at]));
                }
            }
            // All of this warpgroup, and nobody else.
            asm volatile("bar.sync %0, 128;" :: "r"(role) : "memory");
#pragma unroll
            for (unsigned tall = 0; tall < TALL; tall++) {
                pin(totals[tall]);
                const unsigned row_low = first + own_row + 64 * tall, row_high = row_low + 8;
                const auto store = [&](unsigned row, unsigned feature, float result) {
                    const size_t place = size_t(row) * OUT_COLS + feature;
                    if (STORE_BF16) {
                        // The epilogue has rounded it.
                        reinterpret_cast<unsigned short*>(out_)[place] = __float_as_uint(result) >> 16;
                    } else {
                        out_[place] = result;
                    }
                };
#if FEATURE_ROWS == 2
                // Neighbours hold gate and up of two features: each finishes one.
                const bool even = group % 2 == 0;
                const unsigned gate_row = even ? row_low : row_high - 1, up_row = gate_row + 1;
#else
                const unsigned gate_row = row_low, up_row = row_high;
#endif
                const auto token_of = [&](int at) { return unsigned(at / 2 * 8 + 2 * quarter + at % 2); };
                const float gate_scale = row_scale(span, min(gate_row, last)), up_scale = row_scale(span, min(up_row, last));
                const float gate_bias = row_bias(span, min(gate_row, last)), up_bias = row_bias(span, min(up_row, last));
                // Batches without branches, so that what one value waits for is hidden by the others.
                constexpr int BATCH = N / 4 < 8 ? N / 4 : 8;
#pragma unroll
                for (int begin = 0; begin < N / 4; begin += BATCH) {
                    unsigned rows[BATCH];
                    float weights[BATCH], gates[BATCH], ups[BATCH];
#pragma unroll
                    for (int at = 0; at < BATCH; at++) {
                        const uint2 listed = list[token_of(begin + at)];
                        rows[at] = listed.x;
                        weights[at] = __uint_as_float(listed.y);
                    }
#pragma unroll
                    for (int at = 0; at < BATCH; at++) {
                        const int pair = (begin + at) / 2 * 4 + at % 2;
                        const float one = totals[tall][pair], other = totals[tall][pair + 2];
#if FEATURE_ROWS == 2
                        const float given = __shfl_xor_sync(0xffffffffu, even ? other : one, 4);
                        const float gate_sum = even ? one : given, up_sum = even ? given : other;
#else
                        const float gate_sum = one, up_sum = other;
#endif
                        gates[at] = add_delta(rows[at], gate_row, gate_sum * gate_scale) + gate_bias;
                        ups[at] = add_delta(rows[at], up_row, up_sum * up_scale) + up_bias;
                    }
#pragma unroll
                    for (int at = 0; at < BATCH; at++) {
#if FEATURE_ROWS == 2
                        gates[at] = finish(rows[at], gate_row / 2, gates[at], ups[at]);
#else
                        if (WEIGHTED_ROWS) {
                            gates[at] = weigh_row(weights[at], gates[at]);
                            ups[at] = weigh_row(weights[at], ups[at]);
                        } else {
                            gates[at] = finish(rows[at], gate_row, gates[at], gates[at]);
                            ups[at] = finish(rows[at], up_row, ups[at], ups[at]);
                        }
#endif
                    }
                    if (IN_ORDER) {
                        unsigned char* const ordered = memory + skipped + ORDER_BEGIN + (role - 1) * 32 * ORDER_STRIDE;
                        const auto put = [&](int at, unsigned col, float result) {
                            // The epilogue has rounded it.
                            *reinterpret_cast<unsigned short*>(ordered + token_of(at) * ORDER_STRIDE + col * 2) =
                                __float_as_uint(result) >> 16;
                        };
                        const unsigned first_row = first + (own_row - thread / 32 * 16 - group) + 64 * tall;
#pragma unroll
                        for (int at = 0; at < BATCH; at++) {
                            put(at, (gate_row - first_row) / FEATURE_ROWS, gates[at]);
#if FEATURE_ROWS == 1
                            put(at, up_row - first_row, ups[at]);
#endif
                        }
                        asm volatile("bar.sync %0, 128;" :: "r"(role) : "memory");
                        constexpr unsigned VECS = ORDER_COLS / 8;
                        for (unsigned at = thread; at < BATCH * 4 * VECS; at += 128) {
                            const unsigned token = begin * 4 + at / VECS, col = first_row / FEATURE_ROWS + at % VECS * 8;
                            if (token < tile.count && col * FEATURE_ROWS <= last) {
                                const size_t place = size_t(list[token].x) * OUT_COLS + col;
                                *reinterpret_cast<uint4*>(reinterpret_cast<unsigned short*>(out_) + place) =
                                    *reinterpret_cast<const uint4*>(ordered + at / VECS * ORDER_STRIDE + at % VECS * 16);
                            }
                        }
                        asm volatile("bar.sync %0, 128;" :: "r"(role) : "memory");
                    } else {
#pragma unroll
                        for (int at = 0; at < BATCH; at++) {
                            const bool there = token_of(begin + at) < tile.count;
                            if (there && gate_row <= last) {
                                store(rows[at], gate_row / FEATURE_ROWS, gates[at]);
                            }
#if FEATURE_ROWS == 1
                            if (there && up_row <= last) {
                                store(rows[at], up_row, ups[at]);
                            }
#endif
                    }
                    }
                }
            }
            // Others may still read the list.
            asm volatile("bar.sync %0, 128;" :: "r"(role) : "memory");
        };
        // Products of rows that are not there are left out by groups of 32, and by half where few can be.
        constexpr int FEW = ROWS > 64 ? 64 : ROWS > 16 ? ROWS / 2 : ROWS;
        if (FEW == ROWS || tile.count <= FEW) {
            compute(Int<FEW>());
        } else if (ROWS <= 64) {
            compute(Int<(ROWS <= 64 ? ROWS : FEW)>());
        } else if (tile.count <= 96) {
            compute(Int<(ROWS > 64 ? 96 : FEW)>());
        } else if (tile.count <= 128) {
            compute(Int<(ROWS > 64 ? 128 : FEW)>());
        } else {
            compute(Int<(ROWS > 64 ? 160 : FEW)>());
        }
    };
    EACH_UNIT(visit);
}
