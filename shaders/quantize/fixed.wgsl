// quantize: rows to codes, four to a word, u32 [rows, CODE_WORDS], by scales that the checkpoint has; the scale
// of each row is stored beside. Twin: src/kernels/quantize.rs

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var row = workgroup.y; row < row_count; row += workgroups.y) {
        let scale = fixed_scale(row);
        for (var word = index; word < CODE_WORDS; word += 64u) {
            codes[row * CODE_WORDS + word] = word_of(row, word, scale);
        }
        if index == 0u {
            scales[row] = scale;
        }
    }
}
