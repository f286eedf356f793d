// grouped_gemm on matrix units, up to ROWS rows of a group: out[r, f] = finish(W[slot of r] rows[r / INPUT_DIVISOR]).
// One block: a tile of rows and 32 to 128 rows of its packed matrix; its warps share the columns of few rows, and else have
// matrix rows of their own, so that what they read of the rows comes from the nearest cache.
// The weights are the operand of 16 rows and stream from memory to registers once; tokens are the operand of 8.
// The order of columns within a product is free as long as both operands have the same: a lane takes whole vectors of
// 16 bytes and makes pairs of neighbours in them, so nothing is shuffled or staged.
// Packed matrix: see span.wgsl. out: f32 [rows, OUT_COLS]. Twin: src/kernels/grouped_gemm.rs
// Rows of f32 are three bf16, value, rest and rest of that (2^-25 of the value at most), and three products.

constexpr int WARPS = 4;
constexpr int HEIGHT = 2;  // tiles of 16 matrix rows of a warp
constexpr int WIDTH = ROWS / 8;  // tiles of 8 rows
constexpr int TILE_HEIGHT = 16 * HEIGHT * (WARPS / WARPS_BY_COLUMNS);
constexpr int PAIRS = WEIGHTS_PER_VEC / 2;
constexpr int TERMS = INPUT_F32 ? 3 : 1;
// Vectors that a lane reads of a row before the next are asked for.
constexpr int VECS = SUM_COLS > 0 ? SUM_COLS / (4 * int(WEIGHTS_PER_VEC)) : 2;
constexpr int INPUT_VECS = int(WEIGHTS_PER_VEC) / INPUTS_PER_VEC;
// Sums of a warp in shared memory: rows of tokens, so that lanes of one value fall into different banks.
constexpr int STRIDE = TILE_HEIGHT + 1;
static_assert(VECS >= 1 && TILE_HEIGHT % PAIR == 0, "a step is whole vectors and whole pairs");

__shared__ float partials[WARPS_BY_COLUMNS * ROWS * STRIDE];

struct Weights {
    uint4 vecs[VECS][HEIGHT][2];
};

__device__ __forceinline__ void multiply(float (&sums)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
#if WEIGHT_KIND == 1
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
#endif
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint4 stream_vec(const uint4* at) {
    uint4 vec;
    asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(vec.x), "=r"(vec.y), "=r"(vec.z), "=r"(vec.w) : "l"(at));
    return vec;
}

__device__ __forceinline__ unsigned word_of(const uint4& vec, int at) {
    return at == 0 ? vec.x : at == 1 ? vec.y : at == 2 ? vec.z : vec.w;
}

// Two E4M3 codes to two binary16, exactly.
__device__ __forceinline__ unsigned halves_of_e4m3(unsigned short codes) {
    unsigned halves;
#if __CUDA_ARCH__ >= 890
    asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(halves) : "h"(codes));
#else
    const unsigned low = codes & 0xffu, high = codes >> 8;
    const unsigned spread = low << 8 | high << 24;
    // Exponent and mantissa in place are the value / 256.
    const unsigned scaled = ((spread >> 1) & 0x3f803f80u) | (spread & 0x80008000u);
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(halves) : "r"(scaled), "r"(0x5c005c00u));
    halves |= (low & 0x7fu) == 0x7fu ? 0x7fffu : 0u;
    halves |= (high & 0x7fu) == 0x7fu ? 0x7fff0000u : 0u;
#endif
    return halves;
}

// bf16 of two f32, the first one low.
__device__ __forceinline__ unsigned bf16_pair(float low, float high) {
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Pair `at` of a vector of weights, times the scale of its block where that is a power of two.
__device__ __forceinline__ unsigned weight_pair(const uint4& vec, int at, unsigned scale) {
#if WEIGHT_KIND == 0
    return word_of(vec, at);  // bf16
#elif WEIGHT_KIND == 1
    return halves_of_e4m3(word_of(vec, at / 2) >> (at % 2 * 16) & 0xffffu);
#else
    // E2M1: the bytes of four magnitudes come from tables of eight, their signs from the codes.
    const unsigned codes = word_of(vec, at / 4) >> (at % 4 / 2 * 16);
    const unsigned which = codes & 0x7777u;
    unsigned high = __byte_perm(0x3f3f3f00u, 0x40404040u, which);
    const unsigned low = __byte_perm(0xc0800000u, 0xc0804000u, which);
    high |= __byte_perm(codes, codes << 4, 0x1504) & 0x80808080u;
    unsigned pair = __byte_perm(low, high, at % 2 == 0 ? 0x5140 : 0x7362);
    // A product: a sum with -0, which sm_80 has.
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(pair) : "r"(pair), "r"(scale), "r"(0x80008000u));
    return pair;
#endif
}

struct Inputs {
    uint4 vecs[INPUT_VECS];
};

__device__ __forceinline__ Inputs inputs_at(const uint4* row, unsigned vec) {
    Inputs inputs;
#pragma unroll
    for (int at = 0; at < INPUT_VECS; at++) {
        inputs.vecs[at] = row[vec * INPUT_VECS + at];
    }
    return inputs;
}

// Value `at` of the inputs that meet a vector of weights.
__device__ __forceinline__ float f32_of(const Inputs& inputs, int at) {
    return __uint_as_float(word_of(inputs.vecs[at / 4], at % 4));
}

// Pair `at`, of the same columns as `weight_pair`; the rest of it for `term` 1.
__device__ __forceinline__ unsigned input_pair(const Inputs& inputs, int at, int term) {
#if INPUT_CODES
    return halves_of_e4m3(word_of(inputs.vecs[0], at / 2) >> (at % 2 * 16) & 0xffffu);
#else
    const int low = 2 * at, high = low + 1;
#if INPUT_F32
    const float x = f32_of(inputs, low), y = f32_of(inputs, high);
    const unsigned pair = bf16_pair(x, y);
    if (term == 0) {
        return pair;
    }
    // What is not finite has no rest.
    const float u = __uint_as_float(pair << 16), v = __uint_as_float(pair & 0xffff0000u);
    const float s = isfinite(u) ? x - u : 0.0f, t = isfinite(v) ? y - v : 0.0f;
    const unsigned rest = bf16_pair(s, t);
    if (term == 1) {
        return rest;
    }
    return bf16_pair(s - __uint_as_float(rest << 16), t - __uint_as_float(rest & 0xffff0000u));
#else
    return word_of(inputs.vecs[at / 4], at % 4);
#endif
#endif
}

KERNEL {
    WAIT;
    const Tile tile = tile_of(blockIdx.y);
    if (tile.slot < 0) {
        return;
    }
    const Span span = span_of(unsigned(tile.slot));
    const unsigned first = span.row_begin + blockIdx.x * TILE_HEIGHT;
    if (first >= span.row_end) {
        return;
    }
    const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32, group = lane / 4, quarter = lane % 4;
    const unsigned share = warp % WARPS_BY_COLUMNS, warp_row = 16 * HEIGHT * (warp / WARPS_BY_COLUMNS);
    // Rows past the end repeat the last one and are not stored.
    const uint4* weights[HEIGHT][2];
    unsigned matrix_rows[HEIGHT][2];
#pragma unroll
    for (int tall = 0; tall < HEIGHT; tall++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const unsigned row = min(first + warp_row + 16 * tall + 8 * half + group, span.row_end - 1);
            matrix_rows[tall][half] = scale_row(span, row);
            weights[tall][half] = segment_ + span.codes + size_t(row - span.row_begin) * VECS_PER_ROW;
        }
    }
    const uint4* entering[WIDTH];
    unsigned scaled[WIDTH][2];
#pragma unroll
    for (int wide = 0; wide < WIDTH; wide++) {
        const auto row_of = [&](unsigned at) {
            return tile_row(tile, tile.first + min(8 * wide + at, tile.count - 1)) / INPUT_DIVISOR;
        };
        entering[wide] = rows_ + size_t(row_of(group)) * (VECS_PER_ROW * INPUT_VECS);
        scaled[wide][0] = row_of(2 * quarter);
        scaled[wide][1] = row_of(2 * quarter + 1);
    }
    float totals[HEIGHT][WIDTH][4] = {};
    const auto load = [&](Weights& into, unsigned unit) {
#pragma unroll
        for (int at = 0; at < VECS; at++) {
            const unsigned vec = (unit * VECS + at) * 4 + quarter;
#pragma unroll
            for (int tall = 0; tall < HEIGHT; tall++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    into.vecs[at][tall][half] = vec < VECS_PER_ROW ? stream_vec(weights[tall][half] + vec) : uint4{};
                }
            }
        }
    };
    constexpr unsigned UNITS = (VECS_PER_ROW + 4 * VECS - 1) / (4 * VECS);
    Weights now, next;
    if (share < UNITS) {
        load(next, share);
    }
    for (unsigned unit = share; unit < UNITS; unit += WARPS_BY_COLUMNS) {
        now = next;
        if (unit + WARPS_BY_COLUMNS < UNITS) {
            load(next, unit + WARPS_BY_COLUMNS);
        }
        float sums[HEIGHT][WIDTH][4] = {};
        const unsigned col = unit * VECS * 4 * WEIGHTS_PER_VEC;
#pragma unroll
        for (int at = 0; at < VECS; at++) {
            const unsigned vec = (unit * VECS + at) * 4 + quarter;
            unsigned scales[HEIGHT][2] = {};
#if WEIGHT_KIND == 2
#pragma unroll
            for (int tall = 0; tall < HEIGHT; tall++) {
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    // One block a vector; a power of two is exact in bf16.
                    const unsigned block = min(vec, VECS_PER_ROW - 1);
                    scales[tall][half] = (__float_as_uint(scale_at(matrix_rows[tall][half], block)) >> 16) * 0x10001u;
                }
            }
#endif
#pragma unroll
            for (int wide = 0; wide < WIDTH; wide++) {
                const Inputs inputs = vec < VECS_PER_ROW ? inputs_at(entering[wide], vec) : Inputs{};
#pragma unroll
                for (int pair = 0; pair < PAIRS; pair += 2) {
#pragma unroll
                    for (int term = 0; term < TERMS; term++) {
                        const unsigned b0 = input_pair(inputs, pair, term), b1 = input_pair(inputs, pair + 1, term);
#pragma unroll
                        for (int tall = 0; tall < HEIGHT; tall++) {
                            const uint4 &low = now.vecs[at][tall][0], &high = now.vecs[at][tall][1];
                            const unsigned a[4] = {
                                weight_pair(low, pair, scales[tall][0]),
                                weight_pair(high, pair, scales[tall][1]),
                                weight_pair(low, pair + 1, scales[tall][0]),
                                weight_pair(high, pair + 1, scales[tall][1]),
                            };
                            multiply(SUM_COLS > 0 ? sums[tall][wide] : totals[tall][wide], a, b0, b1);
                        }
                    }
                }
            }
        }
        if (SUM_COLS > 0) {
            const unsigned block = block_of(span, first, col);
#pragma unroll
            for (int wide = 0; wide < WIDTH; wide++) {
                const float left = block_input_scale(scaled[wide][0], col), right = block_input_scale(scaled[wide][1], col);
#pragma unroll
                for (int tall = 0; tall < HEIGHT; tall++) {
                    const float low = scale_at(matrix_rows[tall][0], block);
                    const float high = scale_at(matrix_rows[tall][1], block);
                    totals[tall][wide][0] += sums[tall][wide][0] * (low * left);
                    totals[tall][wide][1] += sums[tall][wide][1] * (low * right);
                    totals[tall][wide][2] += sums[tall][wide][2] * (high * left);
                    totals[tall][wide][3] += sums[tall][wide][3] * (high * right);
                }
            }
        }
    }
#pragma unroll
    for (int wide = 0; wide < WIDTH; wide++) {
#pragma unroll
        for (int tall = 0; tall < HEIGHT; tall++) {
#pragma unroll
            for (int at = 0; at < 4; at++) {
                const int token = 8 * wide + 2 * quarter + at % 2, row = warp_row + 16 * tall + 8 * (at / 2) + group;
                partials[(share * ROWS + token) * STRIDE + row] = totals[tall][wide][at];
            }
        }
    }
    __syncthreads();
    constexpr unsigned FEATURES = TILE_HEIGHT / FEATURE_ROWS;
    for (unsigned at = threadIdx.x; at < tile.count * FEATURES; at += 32 * WARPS) {
        const unsigned token = at / FEATURES, block_row = at % FEATURES * FEATURE_ROWS;
        const unsigned matrix_row = first + block_row;
        if (matrix_row >= span.row_end) {
            continue;
        }
        const unsigned row = tile_row(tile, tile.first + token), partner = matrix_row + FEATURE_ROWS - 1;
        const auto sum_of = [&](unsigned wanted) {
            float sum = 0.0f;
            for (int part = 0; part < WARPS_BY_COLUMNS; part++) {
                sum += partials[(part * ROWS + token) * STRIDE + wanted];
            }
            return sum;
        };
        const float token_scale = row_input_scale(row / INPUT_DIVISOR);
        const float gate_sum = sum_of(block_row) * (row_scale(span, matrix_row) * token_scale);
        const float up_sum = sum_of(block_row + FEATURE_ROWS - 1) * (row_scale(span, partner) * token_scale);
        const float gate = add_delta(row, matrix_row, gate_sum) + row_bias(span, matrix_row);
        const float up = add_delta(row, partner, up_sum) + row_bias(span, partner);
        const unsigned out_col = matrix_row / FEATURE_ROWS;
        const float result = finish(row, out_col, gate, up);
        const size_t place = size_t(row) * OUT_COLS + out_col;
        if (STORE_BF16) {
            // The epilogue has rounded it.
            reinterpret_cast<unsigned short*>(out_)[place] = __float_as_uint(result) >> 16;
        } else {
            out_[place] = result;
        }
    }
}
