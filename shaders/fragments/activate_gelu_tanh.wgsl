// 0.5 g (1 + tanh y) is g sigmoid(2 y), which has no cancellation for negative g. Beyond |g| = 20 the sigmoid
// is 0 or 1, and the cube would leave f32.
fn gate_part(gate: f32) -> f32 {
    let g = clamp(gate, -20.0, 20.0);
    return times_sigmoid(gate, 2.0 * 0.7978845608 * (g + 0.044715 * g * g * g));
}

fn up_part(up: f32) -> f32 {
    return up;
}
