const WEIGHTS_PER_VEC: u32 = 16u;
const WEIGHT_FACTOR: f32 = 1.0;

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let codes = bitcast<vec4<i32>>(vec4<u32>(words[quad]) << vec4<u32>(24u, 16u, 8u, 0u));
    return vec4<f32>(codes >> vec4<u32>(24u));
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return f32(bitcast<i32>(word << (24u - 8u * which)) >> 24u);
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
