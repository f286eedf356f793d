// permute: rows (token * TOP_K + slot) in order of slot, stable, and tiles of at most TILE_M rows.
// row_slots [rows] -> sorted_rows [rows], tiles [1 + tiles] of (slot, first position, rows, 0);
// tiles[0].x counts them. One workgroup a slot: it counts all slots, so that it knows where its own
// rows begin without waiting for another. Slots outside 0..NUM_SLOTS are left out.
// Twin: src/kernels/permute.rs
const WORKGROUP: u32 = 256u;

var<workgroup> histogram: array<atomic<u32>, NUM_SLOTS>;
var<workgroup> row_scan: array<u32, WORKGROUP>;
var<workgroup> tile_scan: array<u32, WORKGROUP>;

// Inclusive prefix sums of both arrays.
fn scan(index: u32) {
    for (var reach = 1u; reach < WORKGROUP; reach *= 2u) {
        workgroupBarrier();
        var rows_before = 0u;
        var tiles_before = 0u;
        if index >= reach {
            rows_before = row_scan[index - reach];
            tiles_before = tile_scan[index - reach];
        }
        workgroupBarrier();
        row_scan[index] += rows_before;
        tile_scan[index] += tiles_before;
    }
    workgroupBarrier();
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) workgroup: vec3<u32>, @builtin(local_invocation_index) index: u32) {
    let own = workgroup.x;
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var i = index; i < NUM_SLOTS; i += WORKGROUP) {
        atomicStore(&histogram[i], 0u);
    }
    workgroupBarrier();
    for (var row = index; row < row_count; row += WORKGROUP) {
        let slot = row_slots[row];
        if slot >= 0 && slot < i32(NUM_SLOTS) {
            atomicAdd(&histogram[slot], 1u);
        }
    }
    workgroupBarrier();

    // Rows and tiles of the slots before this one; of all slots for the count of tiles.
    var rows_before = 0u;
    var tiles_before = 0u;
    var all_tiles = 0u;
    for (var i = index; i < NUM_SLOTS; i += WORKGROUP) {
        let count = atomicLoad(&histogram[i]);
        let tile_count = (count + TILE_M - 1u) / TILE_M;
        all_tiles += tile_count;
        if i < own {
            rows_before += count;
            tiles_before += tile_count;
        }
    }
    row_scan[index] = rows_before;
    tile_scan[index] = tiles_before;
    scan(index);
    let first_row = row_scan[WORKGROUP - 1u];
    let first_tile = tile_scan[WORKGROUP - 1u];
    workgroupBarrier();

    // Each invocation owns a run of consecutive rows, so that ranks follow the order of rows.
    let run = (row_count + WORKGROUP - 1u) / WORKGROUP;
    let begin = min(index * run, row_count);
    let end = min(begin + run, row_count);
    var mine = 0u;
    for (var row = begin; row < end; row++) {
        if row_slots[row] == i32(own) {
            mine++;
        }
    }
    row_scan[index] = mine;
    tile_scan[index] = all_tiles;
    scan(index);
    var position = first_row + row_scan[index] - mine;
    for (var row = begin; row < end; row++) {
        if row_slots[row] == i32(own) {
            sorted_rows[position] = row;
            position++;
        }
    }
    let count = row_scan[WORKGROUP - 1u];
    // As few tiles as can be, of one height or full, but for the last.
    let tile_count = max((count + TILE_M - 1u) / TILE_M, 1u);
    let height = select((count + tile_count - 1u) / tile_count, TILE_M, FULL_TILES);
    for (var tile = index; tile * height < count; tile += WORKGROUP) {
        let done = tile * height;
        tiles[1u + first_tile + tile] = vec4<u32>(own, first_row + done, min(height, count - done), 0u);
    }
    if own == 0u && index == 0u {
        tiles[0] = vec4<u32>(tile_scan[WORKGROUP - 1u], 0u, 0u, 0u);
    }
}
