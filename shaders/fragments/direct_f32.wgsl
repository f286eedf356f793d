const INPUT_FACTOR: f32 = 1.0;

fn direct_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    return bitcast<vec4<f32>>(words);
}

fn direct_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
