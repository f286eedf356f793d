// permute: rows (token * TOP_K + slot) in order of slot, stable, and tiles of at most TILE_M rows.
// row_slots [rows] -> sorted_rows [rows], tiles [1 + tiles] of (slot, first position, rows, 0);
// tiles[0].x counts them. One block a slot: it counts all slots, so that it knows where its own rows begin without
// waiting for another; then each warp places those of its own stretch. Slots outside 0..NUM_SLOTS are left out.
// Twin: src/kernels/permute.rs

constexpr unsigned WARPS = THREADS / 32;

KERNEL {
    __shared__ unsigned histogram[NUM_SLOTS], own_rows[WARPS], rows_before, tiles_before, all_tiles;
    const unsigned own = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (unsigned slot = threadIdx.x; slot < NUM_SLOTS; slot += THREADS) {
        histogram[slot] = 0;
    }
    if (threadIdx.x == 0) {
        rows_before = tiles_before = all_tiles = 0;
    }
    WAIT;
    __syncthreads();
    const unsigned row_count = token_count() * ROWS_PER_TOKEN;
    // A lane has four rows at a time, behind those of the lane before.
    const unsigned stretch = ((row_count + WARPS - 1) / WARPS + 127) / 128 * 128;
    const unsigned begin = min(warp * stretch, row_count), end = min(begin + stretch, row_count);
    const auto each_four = [&](const auto& visit) {
#pragma unroll 2
        for (unsigned first = begin; first < end; first += 128) {
            const unsigned row = first + 4 * lane;
            int4 slots = make_int4(-1, -1, -1, -1);
            if (row + 4 <= end) {
                slots = *reinterpret_cast<const int4*>(row_slots_ + row);
            } else {
                slots.x = row < end ? row_slots_[row] : -1;
                slots.y = row + 1 < end ? row_slots_[row + 1] : -1;
                slots.z = row + 2 < end ? row_slots_[row + 2] : -1;
            }
            visit(row, slots);
        }
    };
    unsigned mine = 0;
    each_four([&](unsigned, int4 slots) {
        const auto count = [&](int slot) {
            if (slot >= 0 && slot < int(NUM_SLOTS)) {
                atomicAdd(&histogram[slot], 1u);
            }
            mine += slot == int(own);
        };
        count(slots.x);
        count(slots.y);
        count(slots.z);
        count(slots.w);
    });
    mine = __reduce_add_sync(0xffffffffu, mine);
    if (lane == 0) {
        own_rows[warp] = mine;
    }
    __syncthreads();
    unsigned rows = 0, tiles = 0, all = 0;
    for (unsigned slot = threadIdx.x; slot < NUM_SLOTS; slot += THREADS) {
        const unsigned count = histogram[slot], of_slot = (count + TILE_M - 1) / TILE_M;
        all += of_slot;
        rows += slot < own ? count : 0;
        tiles += slot < own ? of_slot : 0;
    }
    rows = __reduce_add_sync(0xffffffffu, rows);
    tiles = __reduce_add_sync(0xffffffffu, tiles);
    all = __reduce_add_sync(0xffffffffu, all);
    if (lane == 0) {
        atomicAdd(&rows_before, rows);
        atomicAdd(&tiles_before, tiles);
        atomicAdd(&all_tiles, all);
    }
    __syncthreads();
    unsigned position = rows_before;
    for (unsigned before = 0; before < warp; before++) {
        position += own_rows[before];
    }
    each_four([&](unsigned row, int4 slots) {
        const bool ours[4] = {slots.x == int(own), slots.y == int(own), slots.z == int(own), slots.w == int(own)};
        unsigned place = position;
#pragma unroll
        for (unsigned at = 0; at < 4; at++) {
            const unsigned found = __ballot_sync(0xffffffffu, ours[at]);
            place += __popc(found & ((1u << lane) - 1));
            position += __popc(found);
        }
#pragma unroll
        for (unsigned at = 0; at < 4; at++) {
            if (ours[at]) {
                sorted_rows_[place++] = row + at;
            }
        }
    });
    // As few tiles as can be, of one height or full, but for the last.
    const unsigned count = histogram[own], tile_count = max((count + TILE_M - 1) / TILE_M, 1u);
    const unsigned height = FULL_TILES ? TILE_M : (count + tile_count - 1) / tile_count;
    for (unsigned tile = threadIdx.x; tile * height < count; tile += THREADS) {
        const unsigned done = tile * height;
        tiles_[1 + tiles_before + tile] = make_uint4(own, rows_before + done, min(height, count - done), 0);
    }
    if (own == 0 && threadIdx.x == 0) {
        tiles_[0] = make_uint4(all_tiles, 0, 0, 0);
    }
}
