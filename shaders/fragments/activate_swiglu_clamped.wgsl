fn activate(gate: f32, up: f32) -> f32 {
    return gate_times_sigmoid(at_most(gate, SWIGLU_LIMIT), 1.0) * within(up, SWIGLU_LIMIT);
}
