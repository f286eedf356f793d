fn input_value(index: u32) -> f32 {
    return f32(bitcast<i32>(rows[index >> 2u] << (24u - 8u * (index & 3u))) >> 24u);
}

// Four values from a multiple of 4 on.
fn input_four(index: u32) -> vec4<f32> {
    let codes = bitcast<vec4<i32>>(vec4<u32>(rows[index >> 2u]) << vec4<u32>(24u, 16u, 8u, 0u));
    return vec4<f32>(codes >> vec4<u32>(24u));
}
