fn gate_part(gate: f32) -> f32 {
    return gelu_erf(gate);
}

fn up_part(up: f32) -> f32 {
    return up;
}
