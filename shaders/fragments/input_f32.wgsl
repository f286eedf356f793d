fn input_value(index: u32) -> f32 {
    return bitcast<f32>(rows[index]);
}

// Four values from a multiple of 4 on.
fn input_four(index: u32) -> vec4<f32> {
    return vec4<f32>(input_value(index), input_value(index + 1u), input_value(index + 2u), input_value(index + 3u));
}
