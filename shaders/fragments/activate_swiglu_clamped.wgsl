fn gate_part(gate: f32) -> f32 {
    return times_sigmoid(at_most(gate, SWIGLU_LIMIT), at_most(gate, SWIGLU_LIMIT));
}

fn up_part(up: f32) -> f32 {
    return within(up, SWIGLU_LIMIT);
}
