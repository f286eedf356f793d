fn input_value(index: u32) -> f32 {
    return decode_f16((rows[index >> 1u] >> (16u * (index & 1u))) & 0xffffu);
}

// Four values from a multiple of 4 on.
fn input_four(index: u32) -> vec4<f32> {
    let low = rows[index >> 1u];
    let high = rows[(index >> 1u) + 1u];
    return vec4<f32>(
        decode_f16(low & 0xffffu),
        decode_f16(low >> 16u),
        decode_f16(high & 0xffffu),
        decode_f16(high >> 16u),
    );
}
