// What the kernels on matrix units of warpgroups (compute capability 9.0) have in common: products, copies, barriers.

// The registers of a product of so many rows, as text.
#define R4(a, b, c, d) "%" #a ", %" #b ", %" #c ", %" #d
#define TEXT_8 R4(0, 1, 2, 3)
#define TEXT_16 TEXT_8 ", " R4(4, 5, 6, 7)
#define TEXT_32 TEXT_16 ", " R4(8, 9, 10, 11) ", " R4(12, 13, 14, 15)
#define TEXT_64 TEXT_32 ", " R4(16, 17, 18, 19) ", " R4(20, 21, 22, 23) ", " R4(24, 25, 26, 27) ", " R4(28, 29, 30, 31)
#define TEXT_96 TEXT_64 ", " R4(32, 33, 34, 35) ", " R4(36, 37, 38, 39) ", " R4(40, 41, 42, 43) ", " R4(44, 45, 46, 47)
#define TEXT_128 TEXT_96 ", " R4(48, 49, 50, 51) ", " R4(52, 53, 54, 55) ", " R4(56, 57, 58, 59) ", " R4(60, 61, 62, 63)
#define TEXT_160 TEXT_128 ", " R4(64, 65, 66, 67) ", " R4(68, 69, 70, 71) ", " R4(72, 73, 74, 75) ", " R4(76, 77, 78, 79)
#define SUMS_4(at) "+f"(sums[at]), "+f"(sums[at + 1]), "+f"(sums[at + 2]), "+f"(sums[at + 3])
#define SUMS_8 SUMS_4(0)
#define SUMS_16 SUMS_8, SUMS_4(4)
#define SUMS_32 SUMS_16, SUMS_4(8), SUMS_4(12)
#define SUMS_64 SUMS_32, SUMS_4(16), SUMS_4(20), SUMS_4(24), SUMS_4(28)
#define SUMS_96 SUMS_64, SUMS_4(32), SUMS_4(36), SUMS_4(40), SUMS_4(44)
#define SUMS_128 SUMS_96, SUMS_4(48), SUMS_4(52), SUMS_4(56), SUMS_4(60)
#define SUMS_160 SUMS_128, SUMS_4(64), SUMS_4(68), SUMS_4(72), SUMS_4(76)

#if WEIGHT_KIND == 1
#define SHAPE "k32.f32.e4m3.e4m3"
#define TRANSPOSED ""
#else
#define SHAPE "k16.f32.bf16.bf16"
#define TRANSPOSED ", 0, 0"
#endif

// sums = left right, or + sums: 64 rows by N rows, 32 bytes of each. Both operands by their place in a stage, as
// `panel_at` has it: the units are told of rows of 128 bytes in groups of 8, with vectors exchanged within a row.
template <int N> __device__ void multiply(float (&sums)[N / 2], unsigned left, unsigned right, bool add);
// Likewise with the 64 rows in registers.
template <int N> __device__ void multiply(float (&sums)[N / 2], const unsigned (&left)[4], unsigned right, bool add);
#define MULTIPLY(n, a, b, p, a1, a2, a3, b2, p2) \
    template <> __device__ __forceinline__ void multiply<n>(float (&sums)[n / 2], unsigned left, unsigned right, bool add) { \
        asm volatile("{ .reg .pred add; .reg .b64 left, right;" \
            " mov.b64 left, {%" #a ", 0x40000040}; mov.b64 right, {%" #b ", 0x40000040};" \
            " setp.ne.b32 add, %" #p ", 0; wgmma.mma_async.sync.aligned.m64n" #n SHAPE \
            " {" TEXT_##n "}, left, right, add, 1, 1" TRANSPOSED "; }" \
            : SUMS_##n : "r"(left), "r"(right), "r"(int(add))); \
    } \
    template <> __device__ __forceinline__ void multiply<n>(float (&sums)[n / 2], const unsigned (&left)[4], unsigned right, bool add) { \
        asm volatile("{ .reg .pred add; .reg .b64 right; mov.b64 right, {%" #b2 ", 0x40000040};" \
            " setp.ne.b32 add, %" #p2 ", 0; wgmma.mma_async.sync.aligned.m64n" #n "k16.f32.bf16.bf16" \
            " {" TEXT_##n "}, {" R4(a, a1, a2, a3) "}, right, add, 1, 1, 0; }" \
            : SUMS_##n : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right), "r"(int(add))); \
    }
MULTIPLY(16, 8, 9, 10, 9, 10, 11, 12, 13)
MULTIPLY(32, 16, 17, 18, 17, 18, 19, 20, 21)
MULTIPLY(64, 32, 33, 34, 33, 34, 35, 36, 37)
MULTIPLY(96, 48, 49, 50, 49, 50, 51, 52, 53)
MULTIPLY(128, 64, 65, 66, 65, 66, 67, 68, 69)
MULTIPLY(160, 80, 81, 82, 81, 82, 83, 84, 85)

// Registers that a product writes may not be read or moved before it is waited for.
template <int N> __device__ __forceinline__ void pin(float (&sums)[N]) {
#pragma unroll
    for (int at = 0; at < N; at++) {
        asm volatile("" : "+f"(sums[at]) :: "memory");
    }
}

__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void wait_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory");
}

__device__ __forceinline__ void arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

__device__ __forceinline__ void wait_for(unsigned barrier, unsigned parity) {
    asm volatile("{ .reg .pred done; again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @!done bra again; }"
        :: "r"(barrier), "r"(parity) : "memory");
}

// A stage that has been copied; the units read shared memory by another way than threads write it.
__device__ __forceinline__ void wait_for_copies(unsigned barrier, unsigned parity) {
    wait_for(barrier, parity);
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// What a map of boxes holds is the driver's.
struct alignas(64) BoxMap {
    unsigned long long words[16];
};

// A box [matrix, row, byte], with zeros where there is nothing; the barrier expects its bytes.
__device__ __forceinline__ void copy_box(
    unsigned to, const BoxMap& map, unsigned byte, unsigned row, unsigned matrix, unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
        :: "r"(to), "l"(&map), "r"(byte), "r"(row), "r"(matrix), "r"(barrier) : "memory");
}

// Arrives, and lets the barrier wait for so many bytes of boxes.
__device__ __forceinline__ void expect_bytes(unsigned barrier, unsigned bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

// 16 bytes, or none of them and zeros.
__device__ __forceinline__ void copy_vec(unsigned to, const uint4* from, unsigned bytes) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" :: "r"(to), "l"(from), "r"(bytes) : "memory");
}

__device__ __forceinline__ void copy_word(unsigned to, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" :: "r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ unsigned panel_at(unsigned address) {
    return address >> 4 | 1u << 16;
}

// Where a block's shared memory is for the units, from a multiple of 1 KiB on, and how much is skipped for that.
__device__ __forceinline__ unsigned ring_of(const unsigned char* memory, unsigned& skipped) {
    unsigned ring;
    asm("{ .reg .u64 address; cvta.to.shared.u64 address, %1; cvt.u32.u64 %0, address; }" : "=r"(ring) : "l"(memory));
    skipped = (1024 - ring % 1024) % 1024;
    return ring + skipped;
}

// Barriers of stages: full when so many copiers have arrived, and all bytes that they expect; empty when all warps that
// multiply have.
__device__ __forceinline__ void prepare_barriers(unsigned full, unsigned empty, unsigned stages, unsigned copiers, unsigned warps) {
    if (threadIdx.x == 0) {
        for (unsigned stage = 0; stage < stages; stage++) {
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(full + 8 * stage), "r"(copiers) : "memory");
            asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(empty + 8 * stage), "r"(warps) : "memory");
        }
        asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
}

// The stage that is next, and the parity of its barriers.
struct Turn {
    unsigned stage = 0, parity = 0;

    __device__ __forceinline__ void advance() {
        stage++;
        if (stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }
};

// All pairs of a tile and a block of matrix rows, this block's share.
template <typename TileOf, typename SpanOf, typename Visit>
__device__ __forceinline__ void each_unit(const TileOf& tile_at, const SpanOf& span_at, const Visit& visit) {
    for (unsigned unit = blockIdx.x;; unit += gridDim.x) {
        const Tile tile = tile_at(unit / MATRIX_BLOCKS);
        if (tile.slot < 0) {
            break;
        }
        const Span span = span_at(unsigned(tile.slot));
        const unsigned first = span.row_begin + unit % MATRIX_BLOCKS * HEIGHT;
        if (first < span.row_end) {
            visit(tile, span, first);
        }
    }
}

// Likewise with the kernel's own buffers.
#define EACH_UNIT(visit) \
    each_unit([&](unsigned at) { return tile_of(at); }, [&](unsigned slot) { return span_of(slot); }, visit)
