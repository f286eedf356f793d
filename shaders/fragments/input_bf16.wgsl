fn input_value(index: u32) -> f32 {
    return bitcast<f32>((rows[index >> 1u] >> (16u * (index & 1u))) << 16u);
}

// Four values from a multiple of 4 on.
fn input_four(index: u32) -> vec4<f32> {
    let low = rows[index >> 1u];
    let high = rows[(index >> 1u) + 1u];
    return bitcast<vec4<f32>>(vec4<u32>(low << 16u, low & 0xffff0000u, high << 16u, high & 0xffff0000u));
}
