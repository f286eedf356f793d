const WEIGHTS_PER_VEC: u32 = 32u;
const WEIGHT_FACTOR: f32 = 1.0;

fn weight_quad(words: vec4<u32>, quad: u32) -> vec4<f32> {
    let codes = (vec4<u32>(words[quad / 2u] >> (16u * (quad % 2u))) >> vec4<u32>(0u, 4u, 8u, 12u)) & vec4<u32>(15u);
    return vec4<f32>(codes) - CODE_ZERO;
}

// One of the weights of a word.
fn weight_one(word: u32, which: u32) -> f32 {
    return f32((word >> (4u * which)) & 15u) - CODE_ZERO;
}

fn weight_nans(words: vec4<u32>) -> u32 {
    return 0u;
}
