fn input_value(index: u32) -> f32 {
    return bitcast<f32>(rows[index]);
}
