// gate and up to what the second GEMM reads, with the roundings of the precision.
fn finish(row: u32, feature: u32, gate: f32, up: f32) -> f32 {
    var g = gate;
    var u = up;
    if ROUND_GATE_UP {
        g = round_model(g);
        u = round_model(u);
    }
    g = gate_part(g);
    u = up_part(u);
    var hidden = 0.0;
    if ROUND_PARTS {
        hidden = round_model(round_model(g) * round_model(u));
    } else {
        hidden = g * u;
    }
    hidden = weigh_hidden(row, hidden);
    if ROUND_HIDDEN {
        hidden = round_model(hidden);
    }
    return hidden;
}
