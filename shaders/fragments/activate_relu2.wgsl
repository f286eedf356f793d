// Without gate both are the value of the first GEMM.
fn gate_part(gate: f32) -> f32 {
    return keep_nan(gate, select(gate, 0.0, gate < 0.0));
}

fn up_part(up: f32) -> f32 {
    return keep_nan(up, select(up, 0.0, up < 0.0));
}
