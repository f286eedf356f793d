fn shared_value(index: u32) -> f32 {
    return shared_out[index];
}
