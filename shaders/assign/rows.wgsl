// assign: slots_out[row] = the matrix that a row meets, i32 [rows]; -1 for none, below that a fault.
// Twin: src/kernels/assign.rs
@compute @workgroup_size(64)
fn main(@builtin(global_invocation_id) invocation: vec3<u32>, @builtin(num_workgroups) workgroups: vec3<u32>) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var row = invocation.x; row < row_count; row += workgroups.x * 64u) {
        slots_out[row] = assigned(row);
    }
}
