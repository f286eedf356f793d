fn activate(gate: f32, up: f32) -> f32 {
    let positive = select(gate, 0.0, gate < 0.0);
    return positive * positive;
}
