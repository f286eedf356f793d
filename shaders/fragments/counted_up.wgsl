fn clamped_value(at: u32) -> f32 {
    let value = input_value(at);
    if ROUND_GATE_UP {
        return round_model(value);
    }
    return value;
}

fn is_counted(row: u32, col: u32) -> bool {
    return abs(clamped_value(2u * (row * COLS + col) + 1u)) > SWIGLU_LIMIT;
}
