fn input_value(index: u32) -> f32 {
    return decode_e4m3((rows[index >> 2u] >> (8u * (index & 3u))) & 0xffu);
}

// Four values from a multiple of 4 on.
fn input_four(index: u32) -> vec4<f32> {
    let word = rows[index >> 2u];
    return vec4<f32>(
        decode_e4m3(word & 0xffu),
        decode_e4m3((word >> 8u) & 0xffu),
        decode_e4m3((word >> 16u) & 0xffu),
        decode_e4m3(word >> 24u),
    );
}
