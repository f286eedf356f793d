fn activate(gate: f32, up: f32) -> f32 {
    return at_most(gate_times_sigmoid(gate, 1.0), SWIGLU_LIMIT) * within(up, SWIGLU_LIMIT);
}
