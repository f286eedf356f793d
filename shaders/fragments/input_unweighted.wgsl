fn weigh_input(row: u32, value: f32) -> f32 {
    return value;
}

fn weigh_input_quad(row: u32, values: vec4<f32>) -> vec4<f32> {
    return values;
}
