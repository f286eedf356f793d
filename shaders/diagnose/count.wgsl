// diagnose: how many values of rows are counted, added to counters[SLOT]; the first chunk sets it. One workgroup.
// Twin: src/kernels/diagnose.rs
const WORKGROUP: u32 = 256u;

var<workgroup> totals: array<u32, WORKGROUP>;

@compute @workgroup_size(256)
fn main(@builtin(local_invocation_index) index: u32) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    var total = 0u;
    for (var row = 0u; row < row_count; row++) {
        if counts(row) {
            for (var col = index; col < COLS; col += WORKGROUP) {
                total += select(0u, 1u, is_counted(row, col));
            }
        }
    }
    totals[index] = total;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if index < half {
            totals[index] += totals[index + half];
        }
    }
    workgroupBarrier();
    if index == 0u {
        counters[SLOT] = totals[0] + select(counters[SLOT], 0u, params.first_token == 0u);
    }
}
