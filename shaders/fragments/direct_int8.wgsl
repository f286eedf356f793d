const INPUT_FACTOR: f32 = 1.0;

fn direct_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let codes = bitcast<vec4<i32>>(vec4<u32>(words[quad]) << vec4<u32>(24u, 16u, 8u, 0u));
    return vec4<f32>(codes >> vec4<u32>(24u));
}

fn direct_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
