fn activate(gate: f32, up: f32) -> f32 {
    let bounded = at_most(gate, SWIGLU_LIMIT);
    return gate_times_sigmoid(bounded, SWIGLU_ALPHA) * (within(up, SWIGLU_LIMIT) + SWIGLU_BETA);
}
