fn input_value(index: u32) -> f32 {
    return decode_f16((rows[index >> 1u] >> (16u * (index & 1u))) & 0xffffu);
}
