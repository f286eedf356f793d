fn gate_part(gate: f32) -> f32 {
    return times_sigmoid(gate, SWIGLU_ALPHA * gate);
}

fn up_part(up: f32) -> f32 {
    return up + SWIGLU_BETA;
}
