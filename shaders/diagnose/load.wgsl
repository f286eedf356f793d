// diagnose: rows of each expert, added to counters[SLOT + expert]; the first chunk sets them, and clears the
// counters before SLOT, which the steps behind this one write if they are planned. One workgroup.
// Twin: src/kernels/diagnose.rs
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) index: u32) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    if params.first_token == 0u && index < SLOT {
        counters[index] = 0u;
    }
    for (var expert = index; expert < NUM_EXPERTS; expert += 256u) {
        var total = 0u;
        for (var row = 0u; row < row_count; row++) {
            total += select(0u, 1u, topk_ids[row] == i32(expert));
        }
        counters[SLOT + expert] = total + select(counters[SLOT + expert], 0u, params.first_token == 0u);
    }
}
