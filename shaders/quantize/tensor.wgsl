// quantize: rows to codes, four to a word, u32 [rows, CODE_WORDS], by one scale that follows from the largest of
// all magnitudes; it is stored for each row. Twin: src/kernels/quantize.rs

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    var amax = 0u;
    for (var at = 0u; at < AMAX_PARTS; at++) {
        amax = max(amax, partial_amax[at]);
    }
    amax = select(amax, NAN_BITS, amax > INFINITE);
    let scale = final_scale(raw_scale(amax));
    let factor = span_factor(amax, scale);
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var row = workgroup.y; row < row_count; row += workgroups.y) {
        for (var word = index; word < CODE_WORDS; word += 64u) {
            codes[row * CODE_WORDS + word] = word_of(row, word, factor);
        }
        if index == 0u {
            scales[row] = scale;
        }
    }
}
