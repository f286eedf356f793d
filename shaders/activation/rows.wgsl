// activation: out[row, col] = what the second GEMM reads of gate and up, f32 [rows, COLS].
// Twin: src/kernels/activation.rs
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) invocation: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    let values = token_count() * ROWS_PER_TOKEN * COLS;
    for (var at = invocation.x; at < values; at += workgroups.x * 64u) {
        out[at] = source_value(at / COLS, at % COLS);
    }
}
