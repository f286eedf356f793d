fn activate(gate: f32, up: f32) -> f32 {
    return gate_times_sigmoid(gate, SWIGLU_ALPHA) * (up + SWIGLU_BETA);
}
