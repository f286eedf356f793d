fn gate_part(gate: f32) -> f32 {
    return keep_nan(gate, SITU_BETA * accurate_tanh(gate / SITU_BETA) * sigmoid(gate));
}

fn up_part(up: f32) -> f32 {
    return SITU_LINEAR_BETA * accurate_tanh(up / SITU_LINEAR_BETA);
}
