fn shared_value(index: u32) -> f32 {
    return 0.0;
}
