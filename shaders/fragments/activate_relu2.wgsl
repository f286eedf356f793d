fn activate(gate: f32, up: f32) -> f32 {
    let positive = select(gate, 0.0, gate < 0.0);
    let bits = bitcast<u32>(gate);
    return bitcast<f32>(select(bitcast<u32>(positive * positive), bits, (bits & 0x7fffffffu) > 0x7f800000u));
}
