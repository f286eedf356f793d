// norm: out[r] = rms_norm(rows[r]) f32 [rows, COLS], one workgroup a row; beyond the grid, workgroups stride.
// SCALE_BEFORE: the scale vector multiplies a row before its norm, else behind it. FACTOR multiplies last.
// Twin: src/kernels/norm.rs
const WORKGROUP: u32 = 64u;

var<workgroup> squares: array<f32, WORKGROUP>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    for (var row = workgroup.x; row < row_count; row += workgroups.x) {
        var sum = 0.0;
        for (var col = index; col < COLS; col += WORKGROUP) {
            let value = before_norm(input_value(row * COLS + col), col);
            sum += value * value;
        }
        squares[index] = sum;
        for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
            workgroupBarrier();
            if index < half {
                squares[index] += squares[index + half];
            }
        }
        workgroupBarrier();
        let scale = 1.0 / sqrt(squares[0] / f32(COLS) + EPS);
        workgroupBarrier();
        for (var col = index; col < COLS; col += WORKGROUP) {
            let value = before_norm(input_value(row * COLS + col), col);
            out[row * COLS + col] = after_norm(value * scale, col) * FACTOR;
        }
    }
}
