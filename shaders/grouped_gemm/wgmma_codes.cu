// grouped_gemm of rows of E4M3 that fill their tiles, on the matrix units of warpgroups (compute capability 9.0):
// out[r, f] = finish(W[slot of r] rows[r / INPUT_DIVISOR]).
// As wgmma.cu, but tokens are the operand of 64 rows, each warpgroup's own, and HEIGHT matrix rows the other one: the sums
// that a thread scales are those of two tokens, so that a scale is one product and stays in a register; and a warp has whole
// rows of results, which it puts in order alone.
// Packed matrix: see span.wgsl. out: f32 or bf16 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs

constexpr unsigned COPIERS = 128;
// Vectors of 16 bytes of a row in a stage.
constexpr unsigned VECS = 8;
constexpr unsigned STEPS = (VECS_PER_ROW + VECS - 1) / VECS;
constexpr unsigned WEIGHT_BYTES = HEIGHT * VECS * 16, STAGE_BYTES = WEIGHT_BYTES + ROWS * VECS * 16;
// A scale a row, and those of gate and up for each 64 matrix rows.
constexpr unsigned SCALES = ROWS + 8;
constexpr unsigned RING_BYTES = STAGES * (STAGE_BYTES + SCALES * 4);
static_assert(STAGES >= 2 && STAGE_BYTES % 1024 == 0, "stages of whole panels");
static_assert(ROWS == 64 * MULTIPLIERS && ROWS == COPIERS && HEIGHT == 128, "a warpgroup has 64 tokens");
// Results of bf16 leave by vectors: a warp's 16 rows, so many columns at a time. Rows of an odd width leave by values.
constexpr bool IN_ORDER = STORE_BF16 && OUT_COLS % 8 == 0;
constexpr unsigned ORDER_COLS = 64, ORDER_STRIDE = ORDER_COLS * 2 + 16, ORDER_BYTES = 16 * ORDER_STRIDE;
constexpr unsigned ORDER_BEGIN = RING_BYTES + 16 * STAGES;
static_assert(ORDER_BEGIN + (IN_ORDER ? 4 * MULTIPLIERS * ORDER_BYTES : 0) + 1024 <= SHARED_BYTES,
    "the ring, its barriers, what is put in order, and where all may begin");
static_assert(RING_BYTES % 16 == 0, "vectors behind it");

KERNEL_WITH(const __grid_constant__ BoxMap weight_boxes) {
    extern __shared__ unsigned char memory[];
    unsigned skipped;
    const unsigned ring = ring_of(memory, skipped);
    const unsigned scales_begin = STAGES * STAGE_BYTES, full = ring + RING_BYTES, empty = full + 8 * STAGES;
    const unsigned thread = threadIdx.x % 128;
    // The compiler is to know that it is the same for all threads of a warp.
    const unsigned role = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);
    // The thread that has boxes copied arrives for them too.
    prepare_barriers(full, empty, STAGES, COPIERS + 1, 4 * MULTIPLIERS);
    WAIT;
    Turn turn;
    const unsigned &stage = turn.stage, &parity = turn.parity;
    if (role == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(COPIER_REGISTERS));
        constexpr unsigned INPUT_STEP = COPIERS / VECS, INPUT_COPIES = ROWS / INPUT_STEP;
        const unsigned input_vec = thread % VECS, input_row = thread / VECS;
        // Vectors of a row stand exchanged, so that those of neighbouring rows lie in different banks.
        const unsigned input_place = WEIGHT_BYTES + input_row * 128 + (input_vec ^ input_row % 8) * 16;
        const auto visit = [&](const Tile& tile, const Span& span, unsigned first) {
            // What stands in the place of rows that are not there meets no row that is.
            const unsigned matrix = span.codes / MATRIX_VECS;
            unsigned input_rows[INPUT_COPIES];
            const auto row_of = [&](unsigned at) {
                return tile_row(tile, tile.first + min(at, tile.count - 1)) / INPUT_DIVISOR;
            };
#pragma unroll
            for (unsigned at = 0; at < INPUT_COPIES; at++) {
                input_rows[at] = row_of(input_row + at * INPUT_STEP) * VECS_PER_ROW + input_vec;
            }
            const unsigned scaled_row = row_of(thread);
            for (unsigned step = 0; step < STEPS; step++) {
                wait_for(empty + 8 * stage, parity ^ 1);
                const unsigned place = ring + stage * STAGE_BYTES;
                const unsigned input_bytes = step * VECS + input_vec < VECS_PER_ROW ? 16 : 0;
                if (thread == 0) {
                    expect_bytes(full + 8 * stage, WEIGHT_BYTES);
                    copy_box(place, weight_boxes, step * VECS * 16, first, matrix, full + 8 * stage);
                }
#pragma unroll
                for (unsigned at = 0; at < INPUT_COPIES; at++) {
                    if (input_row + at * INPUT_STEP < tile.count) {
                        copy_vec(place + input_place + at * INPUT_STEP * 128, rows_ + input_rows[at] + step * VECS, input_bytes);
                    }
                }
                const unsigned scale_place = ring + scales_begin + (stage * SCALES + thread) * 4;
                if (thread < HEIGHT / 64 * PAIR) {
                    const unsigned row = min(first + thread / PAIR * 64, span.row_end - PAIR) + thread % PAIR;
                    const unsigned word = scale_row(span, row) + block_of(span, row, step * 128);
                    copy_word(scale_place + ROWS * 4, reinterpret_cast<const unsigned*>(segment_) + word);
                }
                if (thread < tile.count) {
                    const unsigned group = min(step * 128 / INPUT_GROUP, INPUT_GROUPS - 1);
                    copy_word(scale_place, input_scales_ + group * INPUT_SCALE_COLUMN + scaled_row * INPUT_SCALE_ROW);
                }
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
    // Of the first of this thread's tokens in a tile, the other one is 8 behind it.
    const unsigned own_token = (role - 1) * 64 + thread / 32 * 16 + group;
    const unsigned char* const ring_memory = memory + skipped;
    const auto done = [&]() {
        if (lane == 0) {
            arrive(empty + 8 * stage);
        }
    };
    const auto visit = [&](const Tile& tile, const Span& span, unsigned first) {
        if (tile.count <= (role - 1) * 64) {
            for (unsigned step = 0; step < STEPS; step++) {
                wait_for(full + 8 * stage, parity);
                done();
                turn.advance();
            }
            return;
        }
        // Asked for now, and needed when all is multiplied.
        unsigned rows[2];
        float weights[2];
#pragma unroll
        for (unsigned at = 0; at < 2; at++) {
            rows[at] = tile_row(tile, tile.first + min(own_token + 8 * at, tile.count - 1));
            weights[at] = topk_weight(rows[at]);
        }
        float totals[HEIGHT / 2] = {};
        for (unsigned step = 0; step < STEPS; step++) {
            float sums[HEIGHT / 2];
            const unsigned place = ring + stage * STAGE_BYTES;
            const unsigned tokens = panel_at(place + WEIGHT_BYTES + (role - 1) * 64 * 128), matrix = panel_at(place);
            wait_for_copies(full + 8 * stage, parity);
            begin_products();
#pragma unroll
            for (unsigned at = 0; at < 4; at++) {
                multiply<HEIGHT>(sums, tokens + 2 * at, matrix + 2 * at, at > 0);
            }
            commit_products();
            wait_products<0>();
            pin(sums);
            // One f32 sum a block of columns, scaled, then added: one scale after the other, each from one register.
            const auto scales = reinterpret_cast<const float*>(ring_memory + scales_begin) + stage * SCALES;
            const float entering[2] = {scales[own_token], scales[own_token + 8]};
#pragma unroll
            for (unsigned half = 0; half < HEIGHT / 64; half++) {
#pragma unroll
                for (unsigned col = 0; col < 2; col++) {
                    const float weight = scales[ROWS + half * PAIR + col % PAIR];
#pragma unroll
                    for (unsigned token = 0; token < 2; token++) {
                        const float scale = weight * entering[token];
#pragma unroll
                        for (unsigned at = half * 32; at < half * 32 + 32; at += 4) {
                            totals[at + 2 * token + col] += sums[at + 2 * token + col] * scale;
                        }
                    }
                }
            }
            done();
            turn.advance();
        }
        pin(totals);
        const unsigned last = span.row_end - 1;
        unsigned char* const ordered = memory + skipped + ORDER_BEGIN + (4 * (role - 1) + thread / 32) * ORDER_BYTES;
        // A warp's rows, so many results of each at a time.
        constexpr unsigned BATCH = ORDER_COLS * FEATURE_ROWS / 8;
#pragma unroll
        for (unsigned begin = 0; begin < HEIGHT / 8; begin += BATCH) {
#pragma unroll
            for (unsigned token = 0; token < 2; token++) {
                const bool there = own_token + 8 * token < tile.count;
                float results[BATCH][2];
#pragma unroll
                for (unsigned at = 0; at < BATCH; at++) {
                    const unsigned low = first + (begin + at) * 8 + 2 * quarter;
#pragma unroll
                    for (unsigned col = 0; col < 2; col++) {
                        const unsigned row = low + col;
                        const float sum = totals[4 * (begin + at) + 2 * token + col] * row_scale(span, min(row, last));
                        results[at][col] = add_delta(rows[token], row, sum) + row_bias(span, min(row, last));
                    }
                }
#pragma unroll
                for (unsigned at = 0; at < BATCH; at++) {
                    const unsigned low = first + (begin + at) * 8 + 2 * quarter;
#if FEATURE_ROWS == 2
                    results[at][0] = finish(rows[token], low / 2, results[at][0], results[at][1]);
#else
#pragma unroll
                    for (unsigned col = 0; col < 2; col++) {
                        const float result = results[at][col];
                        results[at][col] = WEIGHTED_ROWS ? weigh_row(weights[token], result) : finish(rows[token], low + col, result, result);
                    }
#endif
                }
#pragma unroll
                for (unsigned at = 0; at < BATCH; at++) {
                    // The epilogue has rounded what is stored as bf16.
                    const unsigned feature = (at * 8 + 2 * quarter) / FEATURE_ROWS;
                    if (IN_ORDER) {
                        unsigned char* const place = ordered + (group + 8 * token) * ORDER_STRIDE + feature * 2;
                        const unsigned one = __float_as_uint(results[at][0]), other = __float_as_uint(results[at][1]);
#if FEATURE_ROWS == 2
                        *reinterpret_cast<unsigned short*>(place) = one >> 16;
#else
                        *reinterpret_cast<unsigned*>(place) = __byte_perm(one, other, 0x7632);
#endif
                        continue;
                    }
#pragma unroll
                    for (unsigned col = 0; col < 2 / FEATURE_ROWS; col++) {
                        const unsigned row = first + begin * 8 + (feature + col) * FEATURE_ROWS;
                        const size_t place = size_t(rows[token]) * OUT_COLS + row / FEATURE_ROWS;
                        if (there && row <= last) {
                            if (STORE_BF16) {
                                reinterpret_cast<unsigned short*>(out_)[place] = __float_as_uint(results[at][col]) >> 16;
                            } else {
                                out_[place] = results[at][col];
                            }
                        }
                    }
                }
            }
            if (IN_ORDER) {
                __syncwarp();
#pragma unroll
                for (unsigned at = 0; at < 16 * ORDER_COLS / 8; at += 32) {
                    const unsigned token = (at + lane) / (ORDER_COLS / 8), vec = lane % (ORDER_COLS / 8);
                    const unsigned above = __shfl_sync(0xffffffffu, rows[1], token % 8 * 4);
                    const unsigned below = __shfl_sync(0xffffffffu, rows[0], token % 8 * 4);
                    const unsigned col = (first + begin * 8) / FEATURE_ROWS + vec * 8;
                    if (own_token - group + token < tile.count && col * FEATURE_ROWS <= last) {
                        const size_t place = size_t(token < 8 ? below : above) * OUT_COLS + col;
                        *reinterpret_cast<uint4*>(reinterpret_cast<unsigned short*>(out_) + place) =
                            *reinterpret_cast<const uint4*>(ordered + token * ORDER_STRIDE + vec * 16);
                    }
                }
                __syncwarp();
            }
        }
    };
    EACH_UNIT(visit);
}
