// diagnose: rows of each expert that should be here and is not, added to counters[expert]; the first chunk sets them.
// One workgroup. Twin: src/kernels/diagnose.rs
@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) index: u32) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var expert = index; expert < NUM_EXPERTS; expert += 256u) {
        var total = 0u;
        for (var row = 0u; row < row_count; row++) {
            total += select(0u, 1u, topk_ids[row] == i32(expert) && row_slots[row] == -2);
        }
        counters[expert] = total + select(counters[expert], 0u, params.first_token == 0u);
    }
}
