fn weigh_input(row: u32, value: f32) -> f32 {
    let weighted = value * topk_weights[row];
    if ROUND_INPUT {
        return round_model(weighted);
    }
    return weighted;
}

fn weigh_input_quad(row: u32, values: vec4<f32>) -> vec4<f32> {
    return vec4<f32>(
        weigh_input(row, values.x),
        weigh_input(row, values.y),
        weigh_input(row, values.z),
        weigh_input(row, values.w),
    );
}
