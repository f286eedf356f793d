// quantize: the largest magnitude of the rows that each workgroup strides over, u32 [workgroups]. Bits order like
// magnitudes, NaN above all. Twin: src/kernels/quantize.rs
const WORKGROUP: u32 = 64u;

var<workgroup> largest: array<u32, WORKGROUP>;

@compute @workgroup_size(64)
fn main(
    @builtin(workgroup_id) workgroup: vec3<u32>,
    @builtin(num_workgroups) workgroups: vec3<u32>,
    @builtin(local_invocation_index) index: u32,
) {
    let row_count = token_count() * ROWS_PER_TOKEN;
    var magnitude = 0u;
    for (var row = workgroup.x; row < row_count; row += workgroups.x) {
        if counts(row) {
            for (var col = index; col < COLS; col += WORKGROUP) {
                magnitude = max(magnitude, bitcast<u32>(source_value(row, col)) & 0x7fffffffu);
            }
        }
    }
    largest[index] = magnitude;
    for (var half = WORKGROUP / 2u; half > 0u; half /= 2u) {
        workgroupBarrier();
        if index < half {
            largest[index] = max(largest[index], largest[index + half]);
        }
    }
    workgroupBarrier();
    if index == 0u {
        partial_amax[workgroup.x] = largest[0];
    }
}
