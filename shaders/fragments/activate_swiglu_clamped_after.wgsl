fn gate_part(gate: f32) -> f32 {
    return at_most(times_sigmoid(gate, gate), SWIGLU_LIMIT);
}

fn up_part(up: f32) -> f32 {
    return within(up, SWIGLU_LIMIT);
}
