fn clamped_value(at: u32) -> f32 {
    let value = input_value(at);
    if ROUND_GATE_UP {
        return round_model(value);
    }
    return value;
}

fn is_counted(row: u32, col: u32) -> bool {
    let gate = clamped_value(2u * (row * COLS + col));
    return gate / (1.0 + exp(-gate)) > SWIGLU_LIMIT;
}
